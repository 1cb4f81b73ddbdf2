"""What is loaded is data: weights, model folders, exports, templates and configs of strangers run nothing."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from alignment.config import load_config
from alignment.embedded import policy_folder, reward_model_folder
from alignment.errors import ConfigError, DataError, ModelError
from alignment.reward_selftest import newly_made
from alignment.types import Prompt
from flow_runs import ROOT, SMOKE
from models.policy import load_policy, load_reader
from models.reward_model import load_reward_model, render

READ = """
import sys
from pathlib import Path

from alignment.embedded import policy_folder, reward_model_folder
from alignment.lineage import main
from alignment.reward_selftest import newly_made
from alignment.run_folder import RunFolder
from fuzz_run_targets import whole_run
from models.checkpoints import read_optimizer_state, verify
from models.policy import load_policy
from models.reward_export import read_version
from models.reward_model import load_reward_model
from reward_fixtures import export_tiny

place, seen, watching = Path(sys.argv[1]), [], False

def hear(event, arguments):
    of_theirs = event in ("exec", "compile", "import") and str(place) in repr(arguments)[:2000]
    if watching and (event == "pickle.find_class" or of_theirs):
        seen.append(f"{event} {arguments!r:.300}")

sys.addaudithook(hear)
run, repository = whole_run(place / "run"), place / "triton_repo"
policy, reward = policy_folder("tiny", place / "cache"), reward_model_folder("tiny", place / "cache")
export_tiny(repository)
checkpoint = run.checkpoints / "step-000001"
watching = True
verify(checkpoint), read_optimizer_state(checkpoint, 0)
run.read_rollouts(1), run.read_metrics()
main([str(run.path), "--verify"])
load_policy(policy, prompt_format="text"), load_reward_model(str(reward))
version = repository / "reward_model" / "1"
load_reward_model(str(version / "weights"), require_head=True), newly_made(version / "weights")
read_version(repository, "reward_model", "1")
watching = False
print("SEEN", seen)
"""


def test_reading_runs_checkpoints_and_exports_unpickles_nothing_and_runs_nothing_of_theirs(tmp_path: Path) -> None:
    """By Python's own audit events, in a process that reads all of them."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], env=environment, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "SEEN []"


class Payload:
    """Unpickling one makes a folder."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.sign),)


LOADERS: dict[str, Callable[[Path], object]] = {
    "policy": lambda folder: load_policy(folder, prompt_format="text"),
    "reward model": lambda folder: load_reward_model(str(folder)),
}


@pytest.fixture(params=LOADERS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[Path], object]]:
    """A copy of a tiny model's folder, and what loads it."""
    tiny = policy_folder if request.param == "policy" else reward_model_folder
    shutil.copytree(tiny("tiny", tmp_path / "cache"), tmp_path / "model")
    return tmp_path / "model", LOADERS[request.param]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_are_not_read(model: tuple[Path, Callable[[Path], object]], tmp_path: Path, name: str) -> None:
    folder, load = model
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ModelError):
        load(folder)
    assert not (tmp_path / "ran").exists()


OWN_CODE = """
import os
os.mkdir({sign!r})
from transformers import {config}, {model}, PreTrainedTokenizerFast
class OwnConfig({config}): pass
class OwnModel({model}): pass
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_s_folder_is_not_run(
    model: tuple[Path, Callable[[Path], object]], tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, load = model
    values = json.loads((folder / file).read_text())
    (folder / "own.py").write_text(
        OWN_CODE.format(sign=str(tmp_path / "ran"), config="LlamaConfig", model="LlamaForCausalLM")
    )
    auto = {"AutoConfig": "own.OwnConfig", "AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
    auto |= dict.fromkeys(("AutoModelForCausalLM", "AutoModelForSequenceClassification"), "own.OwnModel")
    changed = {"auto_map": auto, "model_type": "own"} if file == "config.json" else {"auto_map": auto}
    (folder / file).write_text(json.dumps(values | changed | {"tokenizer_class": "OwnTokenizer"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks where it was not told
    try:
        load(folder)
    except ModelError as error:
        assert "Traceback" not in str(error)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_cut_off_are_no_model_to_the_self_test(tmp_path: Path) -> None:
    shutil.copytree(reward_model_folder("tiny", tmp_path / "cache"), tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text('{"model_type": ["bert"]}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        newly_made(tmp_path / "model")


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.mkdir(sign) }}",
    "{% set _ = messages.append(1) %}",
    "{{ raise_exception.__globals__.keys() }}",
    "{{ 1 / 0 }}",
    "{{ messages[99].content }}",
    "{{ ''.join(5) }}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_templates_reach_nothing_but_their_messages(template: str, tmp_path: Path) -> None:
    """Of the config, and of a policy's tokenizer, which may come from a hub."""
    with pytest.raises(ConfigError, match=r"reward\.template cannot render"):
        render(template, [{"role": "user", "content": "a"}])
    reader = load_reader(policy_folder("tiny", tmp_path), prompt_format="chat", chat_template=template)
    with pytest.raises(DataError, match="chat template refuses it"):
        reader.text(Prompt("p", ({"role": "user", "content": "a"},)))


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [{sign}]",
        "run: !!python/object/apply:os.mkdir [{sign}]",
        "? !!python/object/new:os.mkdir [{sign}]\n: 1",
        "seed: !!python/name:os.mkdir",
    ],
)
def test_yaml_makes_no_python_objects(text: str, tmp_path: Path) -> None:
    text = text.format(sign=tmp_path / "ran")
    (tmp_path / "preset.yaml").write_text(text)
    with pytest.raises(ConfigError, match="not valid YAML: could not determine a constructor"):
        load_config(tmp_path / "preset.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(SMOKE, [f"seed={text}"])
    assert not (tmp_path / "ran").exists()


LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, r"\*a0: write the value out"),
        ("seed: " + "[" * 5000, "it nests too deeply"),
        ("seed: 2001-99-99", "month must be in 1..12"),
        ("seed: 0b_", "invalid literal for int"),
        ("!!map abc", "expected keys with values"),
        ("[1, 2]: 3", "unhashable"),
        ("seed: 1 #" + "x" * 200_000, "has more than 100000 characters"),
    ],
)
def test_a_config_that_would_fill_the_memory_or_is_no_yaml_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "preset.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(tmp_path / "preset.yaml")
    assert "\n" not in str(caught.value)


def test_overrides_name_few_sections_in_one_another() -> None:
    with pytest.raises(ConfigError, match="names 5000 sections in one another"):
        load_config(SMOKE, ["a." * 5000 + "b=1"])
