"""Whole runs of supervised fine-tuning: resume, adapters, the best checkpoints, and the flow from end to end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft_runs
from alignment import reward_stage, sft_stage, task
from alignment.config import load_config, parse_config
from alignment.errors import CheckpointError, StoppedError
from alignment.fitting import read_weights
from alignment.run_folder import RunFolder
from alignment.sft_stage import main, summary
from alignment.sft_worker import trainable_policy
from flow_runs import ROOT, SMOKE, Place, wait_for
from models.adapters import load_trainable
from models.checkpoints import finished, verify
from models.policy import load_policy
from reward_runs import StopAfter
from tiny import random_rows


def config(tmp_path, *overrides):
    own = [override.replace("SUMS", str(tmp_path / "sums.jsonl")) for override in overrides]
    return load_config(SMOKE, [f"run.root={tmp_path}", "sft.val_check_interval=2", *own])


def sums():
    return [json.dumps({"input": f"{i}+1=", "output": f"{i + 1}"}) + "\n" for i in range(40)]


def last_weights(folder):
    return read_weights(finished(folder / "checkpoints")[-1])


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


MIXED = 'sft.train={"toy:demonstrations": 1, "SUMS": 2}'
VARIANTS = [
    (),
    ("sft.packing=rows", "sft.lora_rank=2", "sft.zero_stage=2", MIXED, "sft.validation=null"),
]


@pytest.mark.parametrize("overrides", VARIANTS)
def test_a_training_that_was_stopped_goes_on_as_if_nothing_had_been(tmp_path, overrides):
    (tmp_path / "sums.jsonl").write_text("".join(sums()))
    settings = config(tmp_path, "sft.max_steps=7", *overrides)
    undisturbed, stopped = (sft_runs.begun(settings, name)[0] for name in ("undisturbed", "stopped"))
    expected = sft_runs.work(undisturbed)
    events = sft_runs.work(stopped, StopAfter(2))
    assert events[-1] == {"kind": "stopped", "step": 3, "reason": "the test says so"}
    assert [*events[:-1], *sft_runs.work(stopped)] == expected
    assert [e["step"] for e in expected if e["kind"] == "sft_step"] == list(range(1, 8))
    assert same(last_weights(undisturbed), last_weights(stopped))


def test_a_worker_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path):
    settings = config(tmp_path, "sft.max_steps=7")
    undisturbed, killed = (sft_runs.begun(settings, name)[0] for name in ("undisturbed", "killed"))
    expected = sft_runs.work(undisturbed)
    command = [sys.executable, "-m", "alignment.one_node", "--nproc-per-node=1", "-m", "killed_sft_worker"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(  # its standard input stays open: the end of it would be a request to stop
        [*command, "--folder", str(killed)], env={**os.environ, **environment, "SFT_KILL": "5"},
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.wait(timeout=180) != 0
    assert [path.name for path in finished(killed / "checkpoints")] == ["step-000004"]
    events = sft_runs.work(killed)
    assert events == [e for e in expected if e["step"] > 4]
    records = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 8))
    assert [r["step"] for r in records if r["kind"] == "validation"] == [0, 2, 4, 6, 7]
    assert same(last_weights(undisturbed), last_weights(killed))


@pytest.mark.parametrize("stage", [sft_stage, reward_stage])
def test_a_training_that_stops_says_where_and_why(tmp_path, monkeypatch, stage):
    started, lines = [], []
    (tmp_path / "run").mkdir()

    def stand_in(module, arguments, *, num_workers, on_event, grace_s, check):
        started.append((module, arguments, num_workers, grace_s))
        on_event({"kind": "note", "text": "a word"})
        on_event({"kind": "stopped", "step": 3, "reason": "SIGTERM"})

    monkeypatch.setattr(task, "run_workers", stand_in)
    monkeypatch.setenv(task.COMMAND_STARTED, "1000")
    overrides = ("resources.cpu_workers=2", "loop.stop_grace_s=7", "loop.max_time_per_run=00:00:01:00")
    with pytest.raises(StoppedError, match=r"stopped after step 3: SIGTERM\. .*resume`,? goes on from"):
        stage.train(config(tmp_path, *overrides), RunFolder(tmp_path / "run"), lines.append)
    assert started == [(stage.WORKER, ["--folder", str(tmp_path / "run"), "--ends-at", "1060.0"], 2, 7.0)]
    assert len(lines) == 1 and lines[0].endswith(": a word")


def test_packed_and_padded_trainings_learn_the_same(tmp_path):
    losses = []
    for packing in ("none", "rows"):
        folder, _ = sft_runs.begun(config(tmp_path, f"sft.packing={packing}", "sft.max_steps=6"), packing)
        losses.append([(e["kind"], e["step"], e["loss"]) for e in sft_runs.work(folder) if "loss" in e])
    for (*padded, loss), (*packed, other) in zip(*losses, strict=True):
        assert padded == packed and loss == pytest.approx(other, abs=1e-5)


def test_the_best_checkpoints_by_validation_loss_are_kept_and_the_best_is_the_model(tmp_path, monkeypatch):
    losses = {0: 0.0, 2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 9: 4.0}
    monkeypatch.setattr(
        "alignment.sft_training.validate",
        lambda _, step: [{"kind": "validation", "step": step, "set": "validation", "loss": losses[step]}],
    )
    folder, report = sft_runs.trained(config(tmp_path, "sft.max_steps=9", "sft.keep_best=2"))
    assert report["checkpoints"] == ["step-000004", "step-000006", "step-000009"]
    assert report["model"] == {"uri": str(folder / "model"), "step": 4, "validation_loss": 1.0}
    assert report["validation"] == [{"step": step, "loss": loss} for step, loss in losses.items()]
    expected = read_weights(folder / "checkpoints" / "step-000004")
    saved = load_file(folder / "model" / "model.safetensors")
    assert torch.equal(saved["model.layers.0.mlp.up_proj.weight"], expected["model.layers.0.mlp.up_proj.weight"])
    # Another one's model by the command line.
    command = [sys.executable, "-m", "alignment.sft_stage", str(folder / "checkpoints" / "step-000009")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    subprocess.run([*command, str(tmp_path / "ninth")], check=True, env=environment, timeout=120)
    ninth, last = (
        load_policy(tmp_path / "ninth", prompt_format="text"),
        read_weights(folder / "checkpoints/step-000009"),
    )
    assert torch.equal(ninth.model.model.embed_tokens.weight, last["model.embed_tokens.weight"])


def test_another_checkpoints_model_replaces_nothing(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(sys, "argv", ["sft_stage", str(tmp_path / "step-000001"), str(mine)])
    with pytest.raises(SystemExit, match=r"ConfigError: .*mine is there already: name a folder that is not"):
        main()
    assert (mine / "thesis.txt").read_text() == "years of work"
    with pytest.raises(CheckpointError, match=r"has no trained\.safetensors: name a step-\* folder"):
        read_weights(mine)


def test_merged_adapters_compute_what_the_adapters_did(tmp_path):
    settings = config(tmp_path, "sft.lora_rank=4", "sft.lr=0.01", "sft.max_steps=6", "policy.prompt_format=chat")
    folder, report = sft_runs.trained(settings)
    adapted, _ = trainable_policy(settings)
    weights = read_weights(folder / "checkpoints" / f"step-{report['model']['step']:06d}")
    assert weights and all("lora" in name for name in weights)
    load_trainable(adapted, weights)
    merged = AutoModelForCausalLM.from_pretrained(folder / "model")
    base = load_policy(tmp_path / "cache" / "tiny-policy-1", prompt_format="text").model
    ids = torch.tensor(random_rows([20]))
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits for model in (adapted, merged, base)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 0.1
    assert report["steps"][-1]["loss"] < report["steps"][0]["loss"]


def test_a_tokenizer_gets_the_chat_template_of_the_config(tmp_path):
    template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    settings = config(tmp_path, "policy.prompt_format=chat", f"sft.chat_template={json.dumps(template)}")
    folder, _ = sft_runs.trained(settings.model_copy(update={"sft": settings.sft.model_copy(update={"max_steps": 1})}))
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template == template


def test_a_model_that_leaks_between_packed_sequences_is_refused_before_it_learns(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    from alignment.embedded import policy_folder
    from alignment.errors import ConfigError

    settings = config(tmp_path, f"policy.model={tmp_path / 'opt'}", "sft.packing=rows")
    tokenizer = AutoTokenizer.from_pretrained(policy_folder("tiny", tmp_path / "cache"))
    sizes = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "init_std": 0.3}
    sizes |= {"vocab_size": len(tokenizer), "num_attention_heads": 4, "max_position_embeddings": 256}
    torch.manual_seed(0)
    opt = OPTConfig(eos_token_id=1, **sizes)
    for part in (OPTForCausalLM(opt), tokenizer):
        part.save_pretrained(tmp_path / "opt")
    folder, _ = sft_runs.begun(settings)
    with pytest.raises(ConfigError, match=r"sft\.packing \(rows\): .* set sft\.packing=none"):
        sft_runs.work(folder)


def test_the_flow_from_demonstrations_to_a_policy_that_can_be_aligned(tmp_path):
    place = Place(tmp_path)
    lines = sums()
    (tmp_path / "sums.jsonl").write_text("".join([*lines[:20], "{torn\n", *lines[20:]]))
    mixture = json.dumps({"sums.jsonl": 1, "toy:demonstrations": 3})
    done = place.execute(place.command("sft_flow", "run", sft__train=mixture, sft__max_steps=10, sft__packing="rows"))
    assert done.status == 0, done.output
    folder = (place.root / "sft" / "latest").resolve()
    report = json.loads((folder / "report.json").read_text())
    path = tmp_path / "sums.jsonl"
    assert report["data"][0]["source"] == str(path) and report["data"][0]["left_out"] == {"malformed": 1}
    assert f"left out 1 malformed, listed in {folder}/excluded_examples.jsonl" in done.output
    (excluded,) = [json.loads(line) for line in (folder / "excluded_examples.jsonl").read_text().splitlines()]
    assert excluded["place"] == f"{path}:21"
    steps = report["steps"]
    assert [s["step"] for s in steps] == list(range(1, 11)) and steps[-1]["loss"] < steps[0]["loss"]
    assert all(s["tokens_per_second"] > 0 and s["grad_norm"] > 0 and s["lr"] > 0 for s in steps)
    assert [v["step"] for v in report["validation"]] == [0, 5, 10]
    assert "sft: [##########] step 10/10 | loss " in done.output and "tokens/s | 0 s left" in done.output
    assert summary(report).splitlines()[-1].strip() in done.output
    assert parse_config((folder / "config.json").read_text()).sft.packing == "rows"
    assert verify(folder / "checkpoints" / "step-000010").step == 10
    assert load_policy(folder / "model", prompt_format="text").eos_ids == (1,)
    assert Path(report["model"]["uri"]) == folder / "model"


@pytest.mark.slow
def test_a_flow_that_was_interrupted_is_resumed(tmp_path):
    place = Place(tmp_path)
    settings = {"sft__epochs": 120, "sft__val_check_interval": 50}
    process = subprocess.Popen(
        place.command("sft_flow", "run", **settings), cwd=tmp_path, env=place.environment(),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: list(place.root.glob("sft/*/checkpoints/step-*/DONE")), what="a checkpoint")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    folder = (place.root / "sft" / "latest").resolve()
    assert not (folder / "report.json").exists()
    done = place.resume("sft_flow")
    assert done.status == 0, done.output
    assert (place.root / "sft" / "latest").resolve() == folder
    report = json.loads((folder / "report.json").read_text())
    assert [s["step"] for s in report["steps"]] == list(range(1, 601))
    undisturbed = place.execute(place.command("sft_flow", "run", **settings))
    assert undisturbed.status == 0, undisturbed.output
    other = (place.root / "sft" / "latest").resolve()
    assert other != folder and same(last_weights(folder), last_weights(other))
