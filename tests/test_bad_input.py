"""What users get wrong, and what breaks under them: each time a message with the remedy, and nothing is lost."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

import config_effects as effects
from alignment.config import Config, load_config
from alignment.embedded import policy_folder, reward_model_folder
from alignment.errors import (
    AlignmentError,
    CheckpointError,
    ConfigError,
    DataError,
    DiskError,
    ModelError,
    RewardServerError,
)
from alignment.judge_stage import prepare_judge
from alignment.reward_stage import prepare_reward_model
from alignment.run_folder import RunFolder
from alignment.stages import begin, prepare_scorers
from flow_runs import ROOT, SMOKE, Place
from models.checkpoints import last_checkpoint, verify

TINY = ("wandb.mode=disabled", "reward_training.num_train=64", "judge.num_train_pairs=64")


@pytest.fixture(scope="module", autouse=True)
def restore_threads() -> Iterator[None]:
    """The worker that runs in this process sets them."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with converted models, an exported reward model and a judge."""
    root = tmp_path_factory.mktemp("shared")
    prepare_judge(smoke(root), root / "judge", lambda _: None)
    effects.exported(smoke(root))
    return root


def smoke(root: Path, *overrides: str) -> Config:
    return load_config(SMOKE, [f"run.root={root}", *TINY, *overrides])


def start(root: Path, *overrides: str) -> Path:
    """The flow's first step; returns the run folder."""
    with redirect_stdout(StringIO()):
        return Path(begin(smoke(root, *overrides), f"run-{next(effects._numbers)}")[0])


def refused(kind: type[AlignmentError], root: Path, *overrides: str) -> str:
    """What the flow's first step says."""
    with pytest.raises(kind) as caught:
        start(root, *overrides)
    return str(caught.value)


def write_prompts(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def broken_model(source: Path | str, folder: Path, how: str) -> Path:
    """A copy of a model folder with an unreadable config or weights that were cut off."""
    shutil.copytree(source, folder)
    if how == "config":
        (folder / "config.json").write_text("{garbage")
    else:
        os.truncate(folder / "model.safetensors", 5000)
    return folder


def test_a_model_folder_that_is_not_there(shared: Path) -> None:
    assert refused(ModelError, shared, "policy.model=/no/model") == (
        "policy.model (/no/model): no such model folder; give a folder, a hub name owner/name, "
        "or one of: smollm2-135m, tiny"
    )
    with pytest.raises(ModelError, match=r"reward\.model \(/no/model\): no such model folder; give a folder"):
        prepare_reward_model(smoke(shared, "reward.model=/no/model"), print)


@pytest.mark.parametrize("how", ["config", "weights"])
def test_a_model_folder_that_cannot_be_read(shared: Path, tmp_path: Path, how: str) -> None:
    policy = broken_model(policy_folder("tiny", shared / "cache"), tmp_path / "policy", how)
    with pytest.raises(ModelError) as caught:
        effects.run_iteration(smoke(shared, f"policy.model={policy}"))
    begins, remedy = {
        "config": (
            f"cannot load the policy from {policy}: ",
            "Set policy.model to a folder that save_pretrained wrote",
        ),
        "weights": (f"{policy / 'model.safetensors'} cannot be read as safetensors: ", "put it back from a copy"),
    }[how]
    assert str(caught.value).startswith(begins)
    assert remedy in str(caught.value)
    reward = broken_model(reward_model_folder("tiny", shared / "cache"), tmp_path / "reward", how)
    with pytest.raises(ModelError, match=r"reward\.model .*reward\) cannot be loaded .* Give a folder or hub name"):
        prepare_reward_model(smoke(shared, f"reward.model={reward}"), print)


def test_a_prompt_file_without_prompts(shared: Path, tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "empty.jsonl")
    for key in ("train", "held_out"):
        assert refused(DataError, shared, f"prompts.{key}={path}") == (
            f"{path}: holds no usable prompt; expected lines such as {{text}}, {{prompt}} or {{messages}}"
        )
    assert "no such file; check the path" in refused(DataError, shared, f"prompts.train={tmp_path / 'none.jsonl'}")


def test_prompts_that_are_all_too_long(shared: Path, tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "long.jsonl", *(f"{i} {'x' * 70}" for i in range(30)))
    assert refused(DataError, shared, f"prompts.train={path}") == (
        f"{path}: none of its 30 prompts can be used; the last one: 73 tokens, prompts.max_prompt_tokens is 64. "
        "Raise prompts.max_prompt_tokens, or correct the prompts"
    )


def test_too_few_prompts_name_both_keys(shared: Path, tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "few.jsonl", "a", "b", "c")
    assert refused(ConfigError, shared, f"prompts.train={path}") == (
        "rollouts.num_rollout_samples (4) must be <= the 3 usable prompts of prompts.train: "
        "lower it or name a larger source"
    )
    assert "validation.num_prompts (8) + evaluation.num_prompts (16) must be <= the 3 distinct prompts" in refused(
        ConfigError, shared, f"prompts.held_out={path}"
    )


def test_prompt_and_response_beyond_the_models_context(shared: Path) -> None:
    assert refused(ConfigError, shared, "rollouts.max_new_tokens=4000") == (
        "prompts.max_prompt_tokens (64) + rollouts.max_new_tokens (4000) must be <= the policy's context of 256 "
        "tokens: lower one of them"
    )


def test_prompts_that_are_too_long_are_left_out_and_listed(shared: Path, tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "mixed.jsonl", "a", "b" * 64, "c" * 65, "d", "e", "f" * 200)
    run = start(shared, f"prompts.train={path}")
    excluded = [json.loads(line) for line in (run / "excluded_prompts.jsonl").read_text().splitlines()]
    assert [e["id"] for e in excluded] == ["mixed:3", "mixed:6"]
    lengths = [int(e["reason"].split()[0]) for e in excluded]
    assert lengths[1] - lengths[0] == 135
    assert all(e["reason"].endswith("tokens, prompts.max_prompt_tokens is 64") for e in excluded)
    train = [json.loads(line)["id"] for line in (run / "prompts" / "train.jsonl").read_text().splitlines()]
    assert train == ["mixed:1", "mixed:2", "mixed:4", "mixed:5"]


@pytest.mark.parametrize(
    ("kind", "override", "said"),
    [
        (ConfigError, "reward.max_tokens=300", "reward.max_tokens (300) must be <= 256"),
        (ConfigError, "reward.template='{{ message }}'", "reward.template cannot render"),
        (ModelError, "reward.model=/no/model", "reward.model (/no/model): no such model folder"),
        (DataError, "reward_training.train=/no/pairs.jsonl", "/no/pairs.jsonl: no such file"),
        (DataError, "judge.train_pairs=/no/pairs.jsonl", "/no/pairs.jsonl: no such file"),
        (DataError, "judge.held_out_pairs=imdb:nothing", "imdb:nothing: no built-in pairs"),
    ],
)
def test_what_the_scorers_need_is_looked_at_before_anything_is_trained(
    shared: Path, kind: type[AlignmentError], override: str, said: str
) -> None:
    assert refused(kind, shared, override).startswith(said)


def test_a_run_path_without_a_run(tmp_path: Path) -> None:
    done = Place(tmp_path).run("run", "--run_path", "/no/run", flow="rs_iteration_flow")
    assert done.status != 0 and "--run_path (/no/run): no run folder" in done.output
    assert "Traceback" not in done.output


def test_more_gpus_than_the_machine_has(shared: Path) -> None:
    config = smoke(shared, "resources.gpu=99")
    with pytest.raises(ConfigError) as caught:  # not in `start`, which may run where there is no GPU
        prepare_scorers(config, str(effects.new_run(config).path))
    text = str(caught.value)
    assert text.startswith("resources.gpu (99) is more than the") and "set resources.gpu=0 for the CPU" in text


def test_a_reward_server_that_is_not_there(shared: Path) -> None:
    url = f"127.0.0.1:{closed_port()}"
    with pytest.raises(RewardServerError) as caught:
        prepare_reward_model(smoke(shared, f"reward.url={url}", "reward.timeout_s=1"), print)
    text = str(caught.value)
    assert text.startswith(f"the reward model reward_model at {url} did not answer within 1 s (UNAVAILABLE")
    assert "unset reward.url to have one started" in text


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


ITERATE = """
import sys
from alignment.config import load_config
from alignment.errors import AlignmentError
from alignment.stages import prepare_scorers, run_iteration
preset, run, overrides = sys.argv[1], sys.argv[2], sys.argv[3:]
config = load_config(preset, overrides)
try:
    print(run_iteration(config, run, *prepare_scorers(config, run)))
except AlignmentError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def test_a_port_in_use_is_named_and_the_run_can_go_on(shared: Path) -> None:
    config = smoke(shared)
    run = effects.new_run(config)
    effects.run_iteration(config, run)
    before = last_checkpoint(run.checkpoints)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = iterate_in_a_process(shared, run, f"reward.grpc_port={port}")
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].strip() == (
            f"port {port} on 127.0.0.1 is not free (Address already in use): "
            "set reward.grpc_port or --grpc-port to another, or to 0"
        )
        assert "RewardServerError: the local reward server ended" in done.stderr
        assert "Traceback" not in done.stderr
    assert before is not None and verify(Path(before.uri)) == before
    done = iterate_in_a_process(shared, run, f"reward.grpc_port={port}")  # it is free by now
    assert done.returncode == 0, done.stderr
    assert last_checkpoint(run.checkpoints).step == 4


def iterate_in_a_process(root: Path, run: RunFolder, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The second iteration of a run, with its workers and its server, as the flow's step runs it."""
    command = [sys.executable, "-c", ITERATE, str(SMOKE), str(run.path), f"run.root={root}", *TINY, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=180)


def test_a_damaged_checkpoint_is_named(shared: Path) -> None:
    config = smoke(shared)
    run = effects.new_run(config)
    effects.run_iteration(config, run)
    path = run.checkpoints / "step-000002" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        effects.run_iteration(config, run, until=4)
    assert str(caught.value) == (
        f"{path} is missing or damaged: its size or sha256 is not the manifest's. "
        f"No other checkpoint of {run.checkpoints} is whole: start a new run"
    )
    shutil.rmtree(path.parent)
    effects.run_iteration(config, run, until=2)
    assert last_checkpoint(run.checkpoints).step == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("left", [0, 60_000, 200_000], ids=["nothing left", "no room for weights", "for moments"])
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(small_disk: Path, shared: Path, left: int) -> None:
    config = smoke(small_disk)
    shutil.copytree(shared / "judge", small_disk / "judge")
    run = effects.new_run(config)
    effects.run_iteration(config, run)
    before = last_checkpoint(run.checkpoints)
    disk = os.statvfs(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(disk.f_bavail * disk.f_frsize - left))
    with pytest.raises(DiskError) as caught:
        effects.run_iteration(config, run, until=4)
    assert str(caught.value).startswith(f"cannot write {run.path}/")
    assert "ree s" in str(caught.value) and "resume" in str(caught.value)  # free some space, Free space
    assert before is not None and last_checkpoint(run.checkpoints) == before
    filler.unlink()
    effects.run_iteration(config, run, until=4)
    assert last_checkpoint(run.checkpoints).step == 4
    assert [m["step"] for m in run.read_metrics() if m["kind"] == "step"] == [1, 2, 3, 4]


def test_a_typo_on_the_command_line(tmp_path: Path) -> None:
    for arguments, said in {
        (
            "--set",
            "rollout.temperature=2",
            "run",
        ): "ConfigError: rollout ({'temperature': 2}): unknown key; known here: ",
        ("--set", "training.lr", "run"): "ConfigError: --set training.lr: expected section.field=value",
        ("--config", "config", "no.yaml", "--set", "seed=1", "run"): "ConfigError: cannot read the config no.yaml",
    }.items():
        done = Place(tmp_path).execute([sys.executable, str(ROOT / "flows" / "rs_flow.py"), *arguments])
        assert done.status == 1
        assert done.output.startswith(said)
        assert done.output.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_preset_with_a_typo_is_refused_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("training:\n  learningrate: 1\n")
    flow = str(ROOT / "flows" / "rs_flow.py")
    done = Place(tmp_path).execute([sys.executable, flow, "--config", "config", "mine.yaml", "run"])
    assert done.status != 0
    assert "training.learningrate (1): unknown key; known here: lr, lr_schedule" in done.output
    assert "Traceback" not in done.output
    assert "Task is starting" not in done.output


def test_a_malformed_line_ends_the_flow_with_file_and_line(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "prompts.jsonl", "a", "b")
    with path.open("a") as file:
        file.write('{"text": "c"\n')
    done = Place(tmp_path).run("run", prompts__train=path)
    assert done.status == 1
    assert f"{path}:3: not a JSON object in UTF-8: " in done.output
    assert "DataError" in done.output
    assert "Traceback" not in done.output
