"""Which weights a name means: runs, checkpoints, embedded models, folders and hub names, real files throughout."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from alignment.embedded import policy_folder, reward_model_folder
from alignment.errors import CheckpointError, ConfigError, ModelError
from alignment.policy_source import find_policy, prompt_format_of
from models import checkpoints as cp
from models.policy import load_policy


def find(name: object, root: Path) -> tuple[str, int, str]:
    found = find_policy(str(name), root=root, key="evaluation.model").checkpoint
    return found.uri, found.step, found.sha256


def seal(run: Path, step: int, reward: float | None = None, prompt_format: str = "text") -> Path:
    """A checkpoint of the tiny policy in a run's folder, and its validation."""
    staging = cp.staging_folder(run / "checkpoints", step)
    shutil.copytree(policy_folder("tiny", run.parent / "cache"), staging)
    config = {"policy": {"model": "tiny", "prompt_format": prompt_format}}
    cp.seal(
        run / "checkpoints", step, config=config, details={"ranks": 1, "zero_stage": 0, "run_id": "7", "parent": {}}
    )
    (run / "prompts").mkdir(exist_ok=True)
    if reward is not None:
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"kind": "validation", "step": step, "reward_mean": reward}) + "\n")
    return cp.checkpoint_folder(run / "checkpoints", step)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints, the earlier of which is the better, and a link `latest` to it."""
    run = tmp_path / "123"
    seal(run, 2, reward=0.9)
    seal(run, 4, reward=0.1)
    (tmp_path / "latest").symlink_to("123")
    return run


def test_a_run_means_its_best_checkpoint_by_validation(run: Path) -> None:
    best = run / "checkpoints" / "step-000002"
    digest = hashlib.sha256((best / "model.safetensors").read_bytes()).hexdigest()
    for name in ("123", "latest", run, run.parent / "latest"):
        assert find(name, run.parent) == (str(best), 2, digest)
    (run / "metrics.jsonl").unlink()
    assert find("latest", run.parent)[1] == 4


def test_a_fine_tuning_means_the_model_that_it_wrote(tmp_path: Path) -> None:
    # Its checkpoints hold trained.safetensors alone, which transformers cannot load.
    run, base = tmp_path / "sft" / "9", policy_folder("tiny", tmp_path / "cache")
    (run / "examples").mkdir(parents=True)
    staging = cp.staging_folder(run / "checkpoints", 3)
    staging.mkdir(parents=True)
    shutil.copyfile(base / "model.safetensors", staging / "trained.safetensors")  # type: ignore[operator]
    config = {"policy": {"model": "tiny", "prompt_format": "chat"}}
    cp.seal(run / "checkpoints", 3, config=config, details={"ranks": 1, "zero_stage": 0, "run_id": "9", "parent": {}})
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "validation", "step": 3, "loss": None}) + "\n")
    with pytest.raises(CheckpointError, match=r"the fine-tuning .* has not written its model: resume it"):
        find("sft/9", tmp_path)
    with pytest.raises(CheckpointError, match=r"no whole model: name its run, .*alignment\.sft_stage .*step-000003"):
        find(run / "checkpoints" / "step-000003", tmp_path)
    shutil.copytree(base, run / "model")
    digest = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert find("sft/9", tmp_path) == (str(run / "model"), 0, digest)
    source = find_policy("sft/9", root=tmp_path, key="evaluation.model")
    assert source.run_config == config and source.run is None and prompt_format_of(source, None) == "chat"


def test_a_checkpoint_means_itself_and_knows_its_run(run: Path) -> None:
    folder = run / "checkpoints" / "step-000004"
    assert find(folder, run.parent)[:2] == (str(folder), 4)
    source = find_policy(str(folder), root=run.parent, key="evaluation.model")
    assert source.run == run and source.run_config == {"policy": {"model": "tiny", "prompt_format": "text"}}
    moved = run.parent / "elsewhere" / folder.name
    shutil.copytree(folder, moved)
    assert find_policy(str(moved), root=run.parent, key="evaluation.model").run is None


def test_models_that_no_run_wrote(tmp_path: Path) -> None:
    uri, step, digest = find("tiny", tmp_path)
    assert (uri, step) == (str(policy_folder("tiny", tmp_path / "cache")), 0)
    assert digest == hashlib.sha256((Path(uri) / "model.safetensors").read_bytes()).hexdigest()
    assert find(uri, tmp_path) == (uri, 0, digest)
    assert find("owner/name", tmp_path) == ("owner/name", 0, "")


def test_what_cannot_be_evaluated_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"evaluation\.model \(latset\): no such model folder; .* smollm2-135m"):
        find("latset", tmp_path)
    with pytest.raises(ConfigError, match=r"evaluation\.model \(latest\): there is no run in .*; name a run"):
        find("latest", tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"evaluation\.model \(runs/latest\): there is no run in "):  # no hub is asked
        find("runs/latest", tmp_path / "cache")
    best = run / "checkpoints" / "step-000002"
    (best / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing or damaged.*step-000004 is whole"):
        find("latest", tmp_path)
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"evaluation\.model \(new\): .* has no finished checkpoint: resume"):
        find("new", tmp_path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="pickled holds no safetensors"):
        find(pickled, tmp_path)


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    # transformers fills in random numbers and says so in its log.
    folder = tmp_path / "part"
    shutil.copytree(policy_folder("tiny", tmp_path / "cache"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"cannot load the policy from .*part: its weights lack model\.norm\.weight"):
        load_policy(folder, prompt_format="text")
    with pytest.raises(ModelError, match="its weights lack cls"):
        load_policy(reward_model_folder("tiny", tmp_path / "cache"), prompt_format="text")


def test_prompts_are_read_as_asked_as_trained_or_by_the_tokenizer(run: Path) -> None:
    trained = find_policy("123", root=run.parent, key="evaluation.model")
    plain = find_policy("tiny", root=run.parent, key="evaluation.model")
    assert prompt_format_of(trained, None) == "text"
    assert prompt_format_of(trained, "chat") == "chat"
    assert prompt_format_of(plain, None) == "chat"  # its tokenizer has a template
