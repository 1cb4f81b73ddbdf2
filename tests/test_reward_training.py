"""Training a reward model: the gradient over ranks and ZeRO stages, resume, early stop, LoRA, every loss."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reward_ranks
import reward_runs
from alignment.config import load_config
from alignment.fitting import should_stop_early
from alignment.reward_data import Example
from alignment.reward_stage import prepare_reward_model
from alignment.reward_training import Encoded, RewardLoss, encode_examples
from alignment.run_folder import RunFolder
from flow_runs import wait_for
from models.checkpoints import finished, read_manifest
from models.reward_model import load_reward_model, score_texts
from reward_fixtures import tiny_reward_model
from reward_ranks import model, pairs

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"


def plain_step():
    """Gradient, loss and accuracy of −log σ over all pairs: each text alone, no padding, float64."""
    reward_model = model().double()
    loss, right = torch.zeros((), dtype=torch.float64), 0
    for pair in pairs():
        chosen, rejected = (reward_model(torch.tensor([row])).logits.squeeze() for row in pair.rows)
        loss += torch.log1p(torch.exp(rejected - chosen)) / len(pairs())
        right += bool(chosen > rejected)
    loss.backward()
    return {name: p.grad for name, p in reward_model.named_parameters()}, loss.item(), right / len(pairs())


# 5 pairs: uneven over 2 ranks and over micro-batches, and fewer than the global batch of 8
@pytest.mark.parametrize(
    ("ranks", "zero_stage", "micro_batch_size"), [(1, 0, 8), (2, 3, 2), pytest.param(2, 0, 2, marks=pytest.mark.slow)]
)
def test_gradient_and_validation_are_those_of_plain_torch(tmp_path, ranks, zero_stage, micro_batch_size):
    settings = {"gradient_clip": 1e9, "global_batch_size": 8, "lr": 1.0, "lr_schedule": "constant"}
    settings |= {"zero_stage": zero_stage, "micro_batch_size": micro_batch_size}
    words = [json.dumps(settings), str(tmp_path / "out")]
    if ranks == 1:
        reward_runs.in_this_process(lambda: reward_ranks.run(words))
    else:
        command = [sys.executable, "-m", "alignment.one_node", f"--nproc-per-node={ranks}"]
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command.append(str(ROOT / "tests/reward_ranks.py"))
        subprocess.run([*command, *words], check=True, env={**os.environ, **environment}, timeout=180)
    weights, result = load_file(tmp_path / "out.safetensors"), json.loads((tmp_path / "out.json").read_text())
    gradient, loss, accuracy = plain_step()
    before = model().state_dict()
    assert weights.keys() == gradient.keys()
    for name, expected in gradient.items():
        torch.testing.assert_close((before[name] - weights[name]).double(), expected, atol=1e-5, rtol=1e-4)
    assert result["step"]["loss"] == pytest.approx(loss, abs=1e-5)
    assert result["validation"]["loss"] == pytest.approx(loss, abs=1e-5)
    assert result["validation"]["accuracy"] == accuracy
    norm = torch.stack([g.norm() for g in gradient.values()]).norm().item()
    assert result["step"]["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize(("loss", "margin"), [("bradley_terry", None), ("margin", 0.5), ("scaled", 3.0)])
def test_the_loss_of_pairs_is_that_of_their_rewards(loss, margin):
    examples = [Encoded(pair.rows, margin, ()) for pair in pairs()]
    reward_model = model().eval()
    with torch.no_grad():
        found = RewardLoss(reward_model, loss)(examples).item()
        rewards = [[reward_model(torch.tensor([row])).logits.item() for row in e.rows] for e in examples]
    gaps = [chosen - rejected for chosen, rejected in rewards]
    shift, scale = (margin if loss == "margin" else 0.0), (margin if loss == "scaled" else 1.0)
    assert found == pytest.approx(sum(scale * math.log1p(math.exp(shift - gap)) for gap in gaps), rel=1e-5)


def test_the_loss_of_ratings_leaves_out_what_was_not_rated():
    examples = [
        Encoded((pair.rows[0],), None, labels) for pair, labels in zip(pairs(), [(1.0,), (None,)], strict=False)
    ]
    reward_model = model().eval()
    with torch.no_grad():
        found = RewardLoss(reward_model, "regression")(examples).item()
        predicted = reward_model(torch.tensor([examples[0].rows[0]])).logits.item()
    assert found == pytest.approx((predicted - 1.0) ** 2, rel=1e-3)
    assert [e.count for e in examples] == [1, 0]  # what the sum is divided by


def test_texts_of_an_example_stay_together():
    _, tokenizer = tiny_reward_model()
    encoded = encode_examples(tokenizer, [Example(("abc", "d"), margin=2.0), Example(("ef", "g"))], max_tokens=4)
    assert [[len(row) for row in e.rows] for e in encoded] == [[4, 3], [4, 3]]  # [CLS] and [SEP] included
    assert (encoded[0].margin, encoded[0].length) == (2.0, 4)


def test_early_stop_asks_for_a_lower_loss_within_so_many_validations():
    assert not should_stop_early([3.0, 2.0, 1.0], 2)
    assert not should_stop_early([1.0, 2.0], 2)  # one validation since the best
    assert should_stop_early([1.0, 2.0, 1.0], 2)  # equal is not lower
    assert not should_stop_early([1.0, 2.0, 3.0], None)


def config(tmp_path, *overrides):
    own = [f"run.root={tmp_path}", "reward_training.num_train=96", "reward_training.validation_share=0.2"]
    return load_config(SMOKE, [*own, "reward_training.val_check_interval=2", "reward_training.epochs=3", *overrides])


def last_weights(folder):
    return load_file(finished(folder / "checkpoints")[-1] / "trained.safetensors")


@pytest.mark.parametrize("overrides", [(), ("reward_training.zero_stage=3", "reward_training.lora_rank=2")])
def test_a_training_that_was_stopped_goes_on_as_if_nothing_had_been(tmp_path, overrides):
    settings = config(tmp_path, *overrides)
    undisturbed = reward_runs.work(settings, tmp_path / "undisturbed")
    stopped = reward_runs.work(settings, tmp_path / "stopped", reward_runs.StopAfter(2))
    assert stopped[-1] == {"kind": "stopped", "step": 3, "reason": "the test says so"}
    events = [*stopped[:-1], *reward_runs.work(settings, tmp_path / "stopped")]
    assert events == undisturbed
    assert [e["step"] for e in events if e["kind"] == "reward_validation"] == [2, 4, 6, 8, 9]
    first, second = last_weights(tmp_path / "undisturbed"), last_weights(tmp_path / "stopped")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_best_checkpoint_by_validation_is_exported(tmp_path, monkeypatch):
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 9: 4.0}
    monkeypatch.setattr(
        "alignment.reward_training.validate",
        lambda _, step: [
            {"kind": "validation", "step": step, "set": name, "loss": losses[step] * sign, "accuracy": None}
            for name, sign in (("chooses", 1), ("does not", -1))
        ],
    )
    assert reward_runs.exported(config(tmp_path / "all"))["checkpoint_step"] == 4
    monkeypatch.undo()
    last = reward_runs.exported(config(tmp_path / "last", "reward_training.validation_share=0"))
    assert last["checkpoint_step"] == len(last["training"]["losses"]) == 9
    assert [p.suffix for p in (tmp_path / "all" / "reward_training").iterdir()] == [".lock"]  # the export remains


def test_a_training_that_gets_no_better_stops_early(tmp_path):
    card = reward_runs.exported(config(tmp_path, "reward_training.lr=1e-30", "reward_training.stop_after=2"))
    assert [record["step"] for record in card["training"]["validations"]] == [2, 4, 6]


def test_adapters_are_merged_in_the_export(tmp_path):
    card = reward_runs.exported(config(tmp_path, "reward_training.lora_rank=4", "reward_training.lr=0.01"))
    weights = tmp_path / "triton_repo" / "reward_model" / card["version"] / "weights"
    loaded, tokenizer = load_reward_model(str(weights), require_head=True)
    assert not [name for name, _ in loaded.named_parameters() if "lora" in name]
    base, _ = load_reward_model(str(tmp_path / "cache" / "tiny-reward-model-1"))
    changed = {name for name, p in loaded.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert "classifier.weight" in changed and "bert.encoder.layer.0.attention.self.query.weight" in changed
    assert "bert.embeddings.word_embeddings.weight" not in changed
    good, bad = score_texts(loaded, tokenizer, ["good great fine", "bad awful poor"], max_tokens=64)
    assert card["accuracy"] > 0.9 or good > bad


def test_a_checkpoint_names_its_recipe_and_ranks(tmp_path):
    reward_runs.work(config(tmp_path), tmp_path / "some-recipe")
    manifest = read_manifest(finished(tmp_path / "some-recipe" / "checkpoints")[-1])
    assert (manifest["run_id"], manifest["ranks"], manifest["step"]) == ("some-recipe", 1, 9)


def test_who_wants_a_model_that_another_process_makes_waits_and_finds_it(tmp_path):
    settings, notes = config(tmp_path, "reward_training.num_train=64"), []
    made = reward_runs.exported(settings)
    (lock,) = (tmp_path / "reward_training").glob("*.lock")
    with ThreadPoolExecutor(1) as pool:
        with RunFolder(lock).lock():
            waiting = pool.submit(prepare_reward_model, settings, notes.append)
            wait_for(lambda: notes, what="a note")
            assert notes[0].startswith("reward model: waiting, since another process makes it")
            assert not waiting.done()
        assert waiting.result(timeout=60).version == made["version"]
