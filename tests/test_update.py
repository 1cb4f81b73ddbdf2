"""The update against one plain backward in torch: loss, gradient norm and gradient, over ranks and ZeRO stages."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import update_ranks
from alignment.config_training import TrainingSection
from alignment.engine import (
    Ranks,
    build_engine,
    check_finite,
    gradient_accumulation_steps,
    keep_layer_inputs_only,
    learning_rate,
    optimizer_tensors,
    start_ranks,
)
from alignment.errors import ConfigError, TrainingError
from alignment.micro_batches import sequence_micro_batches
from alignment.types import StepUpdate
from alignment.update import token_sequence
from models.adapters import copy_weights, load_trainable, merge_lora
from models.sampling import Sampling, draw
from models.sequence_loss import SequenceLoss
from reward_runs import in_this_process
from tiny import tiny_llama
from update_ranks import BASE_SEED, RESPONSE_LENGTHS, plain_gradient, rollouts

ROOT = Path(__file__).resolve().parent.parent


def case(folder, steps=1, plain=True, options=(), **settings):
    """Arguments of tests/update_ranks.py, which leaves its results in `folder`."""
    settings = {"gradient_clip": 1e9, "global_batch_size": 8, **settings}
    plainly = ["--plain-gradient"] if plain else []
    return [json.dumps(settings, separators=(",", ":")), str(folder / "out"), str(steps), *plainly, *options]


def launch(ranks, cases):
    """The cases, one after the other, on ranks of their own, which compile nothing: no extension and no kernel."""
    command = [sys.executable, "-m", "alignment.one_node", f"--nproc-per-node={ranks}"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command.append(str(ROOT / "tests/update_ranks.py"))
    words = [word for words in cases for word in ("--next", *words)][1:]
    with tempfile.TemporaryDirectory() as built:
        folders = {name: f"{built}/{name}" for name in ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        subprocess.run([*command, *words], check=True, env={**os.environ, **environment, **folders}, timeout=180)
        assert not [path for path in Path(built).rglob("*") if path.is_file()]  # torch makes a folder as it is imported


def results(folder):
    """The weights and the StepUpdate that a case left."""
    return load_file(folder / "out.safetensors"), json.loads((folder / "out.json").read_text())


def run_update(folder, plain=True, **case_of):
    """`update` on one rank: in this process with plain gradients, else on a rank of its own."""
    words = case(folder, plain=plain, **case_of)
    if plain:
        in_this_process(lambda: update_ranks.run(words))
    else:
        launch(1, [words])
    return results(folder)


def norm(tensors):
    """The length of all tensors taken as one vector."""
    return torch.stack([t.double().norm() for t in tensors]).norm().item()


FLOAT32 = 3e-6
"""How far a float32 gradient may lie from the float64 one, as a share of its length; DeepSpeed has no float64.

Measured on one rank over 96 cases of ZeRO stage, micro-batch, layout and selection: at most 1.5e-6, and 0.8e-6 from a
plain float32 backward.
"""


def check_gradient(weights, gradient, within=FLOAT32):
    """The saved gradient is the expected one but for a share of its length."""
    assert weights.keys() == gradient.keys()
    difference = norm(weights[name].double() - expected.double() for name, expected in gradient.items())
    assert difference <= within * norm(gradient.values())


# 5 responses: uneven over 2 ranks, over micro-batches, and fewer than the global batch of 8
ONE_RANK = [
    (0, 8, []),
    (0, 8, ["--padded"]),
    (0, 2, ["--tied"]),
    (1, 3, []),
    (2, 2, ["--padded"]),
    (3, 2, []),
    (3, 8, ["--tied"]),
]
TWO_RANKS = [
    (0, 1, []),
    (1, 2, ["--padded"]),
    (2, 2, []),
    (2, 8, ["--tied"]),
    (3, 1, ["--padded"]),
    (3, 2, ["--copy"]),
    (3, 4, ["--tied"]),
]
PENALTY = {"kl_penalty": 0.3, "micro_batch_size": 2}
LORA = {**PENALTY, "lora_rank": 2}


def check_update(weights, result, options):
    gradient, loss, _ = plain_gradient(rollouts(), model=tiny_llama(tied="--tied" in options))
    check_gradient(weights, gradient)
    assert result["loss"] == pytest.approx(loss, abs=1e-6)
    assert result["grad_norm"] == pytest.approx(norm(gradient.values()), rel=1e-6)
    assert result["response_tokens"] == sum(RESPONSE_LENGTHS)
    assert (result["optimizer_steps"], result["kl"]) == (1, None)


def check_penalty(weights, result):
    gradient, loss, kl = plain_gradient(rollouts(), kl_penalty=0.3)
    check_gradient(weights, gradient)  # the base is not among the weights
    assert (result["loss"], result["kl"]) == (pytest.approx(loss, abs=1e-6), pytest.approx(kl, abs=1e-6))


def check_adapters(weights, result):
    """The KL is that to the policy without its adapters, and they alone are trained."""
    adapted = update_ranks.with_adapters(tiny_llama(), TrainingSection(**LORA))
    gradient, loss, kl = plain_gradient(rollouts(), 0.3, model=adapted, base=tiny_llama().double())
    check_gradient(weights, gradient)
    assert (result["loss"], result["kl"]) == (pytest.approx(loss, abs=1e-6), pytest.approx(kl, abs=1e-6))
    assert kl > 0.01


@pytest.mark.parametrize(("zero_stage", "micro_batch_size", "options"), ONE_RANK)
def test_gradient_is_that_of_one_plain_backward(tmp_path, zero_stage, micro_batch_size, options):
    settings = {"zero_stage": zero_stage, "micro_batch_size": micro_batch_size}
    check_update(*run_update(tmp_path, options=options, **settings), options)


def test_penalty_adds_the_gradient_of_the_exact_kl_to_the_base(tmp_path):
    check_penalty(*run_update(tmp_path, **PENALTY))


def test_adapters_alone_are_trained_and_their_base_is_the_policy_without_them(tmp_path):
    check_adapters(*run_update(tmp_path, **LORA))


def test_on_two_ranks_the_gradient_is_the_same(tmp_path):
    plain = [
        case(tmp_path / str(i), options=options, zero_stage=stage, micro_batch_size=size)
        for i, (stage, size, options) in enumerate(TWO_RANKS)
    ]
    more = {"penalty": PENALTY, "penalty-2": PENALTY | {"zero_stage": 2}, "penalty-3": PENALTY | {"zero_stage": 3}}
    more |= {"lora": LORA, "lora-2": LORA | {"zero_stage": 2}, "lora-3": LORA | {"zero_stage": 3}}
    for name in [*map(str, range(len(plain))), *more]:
        (tmp_path / name).mkdir()
    (tmp_path / "copy").mkdir()
    copied = case(tmp_path / "copy", options=["--copy"], **more["lora-3"])
    launch(2, [*plain, *(case(tmp_path / name, **settings) for name, settings in more.items()), copied])
    for i, (_, _, options) in enumerate(TWO_RANKS):
        check_update(*results(tmp_path / str(i)), options)
    for name in more:
        check = check_adapters if name.startswith("lora") else check_penalty
        check(*results(tmp_path / name))
    adapted = update_ranks.with_adapters(tiny_llama(), TrainingSection(**LORA))
    load_trainable(adapted, results(tmp_path / "lora-3")[0])
    merged, copy = merge_lora(adapted).state_dict(), results(tmp_path / "copy")[0]
    assert all(torch.equal(copy[name], tensor) for name, tensor in merged.items())


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, zero_stage):
    settings = {"gradient_checkpointing": True, "zero_stage": zero_stage, "micro_batch_size": 4}
    check_update(*run_update(tmp_path, **settings), [])


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_an_optimizer_on_the_host_changes_no_gradient(tmp_path, zero_stage):
    # Here the host is all there is: DeepSpeed's way of doing it is seen, and that nothing is compiled.
    check_update(*run_update(tmp_path, offload_optimizer=True, zero_stage=zero_stage, micro_batch_size=2), [])


def test_a_plain_copy_follows_the_adapters_as_peft_merges_them():
    adapted, copy = update_ranks.with_adapters(tiny_llama(), TrainingSection(**LORA)), tiny_llama(BASE_SEED)
    copy_weights(adapted, copy)
    merged = merge_lora(adapted).state_dict()
    assert merged.keys() == copy.state_dict().keys()
    assert all(torch.equal(copy.state_dict()[name], tensor) for name, tensor in merged.items())


def test_each_optimizer_step_is_normalised_by_its_own_tokens(tmp_path):
    weights, result = run_update(tmp_path, options=["--sgd"], global_batch_size=3, micro_batch_size=1)
    model = tiny_llama()
    for rows in (rollouts()[:3], rollouts()[3:]):  # the second step starts from the first one's weights
        tokens = sum(r.num_tokens for r in rows)
        model.zero_grad()
        for r in rows:
            logits = model(torch.tensor([r.prompt_ids + r.response_ids])).logits[0, len(r.prompt_ids) - 1 : -1]
            (
                torch.nn.functional.cross_entropy(logits, torch.tensor(r.response_ids), reduction="sum") / tokens
            ).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad
    assert result["optimizer_steps"] == 2
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(weights[name], expected, atol=1e-5, rtol=1e-3)


def test_weights_are_bit_identical_when_repeated(tmp_path):
    first, _ = run_update(tmp_path, steps=3, plain=False, lr=1e-3)
    second, _ = run_update(tmp_path, steps=3, plain=False, lr=1e-3)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], tiny_llama().state_dict()["lm_head.weight"])


def test_dropout_draws_from_its_named_stream_alone(tmp_path):
    first, _ = run_update(tmp_path, options=["--dropout", "1"])
    second, _ = run_update(tmp_path, options=["--dropout", "5000"])
    without, _ = run_update(tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], without["lm_head.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_is_an_error_that_names_the_rate(value):
    with pytest.raises(TrainingError, match=r"loss is (nan|inf).*training\.lr"):
        check_finite(value, "loss", "training")
    with pytest.raises(TrainingError, match=r"training\.lr"):
        draw(torch.full((1, 4), float("nan")), torch.tensor([0.5]), Sampling(1))


@pytest.mark.parametrize("packed", [False, True])
def test_all_ranks_get_equally_many_micro_batches_and_every_row_once(packed):
    training = TrainingSection(global_batch_size=12, micro_batch_size=2)
    rows = [token_sequence(r) for r in rollouts()]
    passes = gradient_accumulation_steps(training, 2)
    shares = [sequence_micro_batches(rows, 2, Ranks(rank, 2), passes, packed=packed) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    dealt = [s.ids for share in shares for sequences, weight in share for s in sequences if weight]
    assert sorted(dealt) == sorted(s.ids for s in rows)
    fillers = [len(sequences) for share in shares for sequences, weight in share if not weight]
    assert fillers == [1] * (1 if packed else 3)  # 5 rows lie in 5 packed micro-batches, or in 3 of their like


def test_learning_rate_by_hand():
    def rates(**settings):
        training = TrainingSection(lr=1.0, **settings)
        return [learning_rate(step, training, total_steps=5) for step in range(1, 6)]

    assert rates() == [1, 1, 1, 1, 1]
    assert rates(warmup_steps=2) == [0.5, 1, 1, 1, 1]
    assert rates(lr_schedule="linear", min_lr=0.2) == pytest.approx([1, 0.84, 0.68, 0.52, 0.36])
    assert rates(lr_schedule="cosine") == pytest.approx([1, 0.904508, 0.654508, 0.345492, 0.095492], abs=1e-6)
    assert rates(lr_schedule="linear", warmup_steps=2) == pytest.approx([0.5, 1, 1, 2 / 3, 1 / 3])
    assert rates(lr_schedule="cosine", constant_steps=2, min_lr=0.1) == pytest.approx([1, 0.775, 0.325, 0.1, 0.1])
    assert rates(lr_schedule="linear", warmup_steps=1, constant_steps=1) == pytest.approx([1, 1, 2 / 3, 1 / 3, 0])
    assert rates(lr_schedule="cosine", warmup_steps=3, constant_steps=1) == pytest.approx([1 / 3, 2 / 3, 1, 1, 0])


def test_constant_steps_leave_a_schedule():
    training = TrainingSection(lr_schedule="linear", warmup_steps=1, constant_steps=2, lr=1.0)
    training.check_schedule(4)
    assert [learning_rate(step, training, total_steps=4) for step in range(1, 5)] == [1, 1, 0, 0]
    with pytest.raises(ConfigError, match=r"training\.constant_steps \(2\) must be < the 3 steps"):
        training.check_schedule(3)


@pytest.mark.parametrize("zero_stage", range(4))
def test_an_engine_that_starts_in_bfloat16_changes_no_weight(zero_stage):
    """DeepSpeed's step on zeros would decay them by lr × weight_decay, here a third."""
    training = TrainingSection(lr=1.0, weight_decay=0.3, zero_stage=zero_stage)
    expected = sum(float(p.detach().float().norm() ** 2) for p in tiny_llama().to(torch.bfloat16).parameters())

    def build():
        loss = SequenceLoss(tiny_llama().to(torch.bfloat16), packed=True)
        start_ranks(threads=1, gpu=False)
        engine = build_engine(loss, training, zero_stage=zero_stage, world_size=1)
        masters.extend(t for name, t in optimizer_tensors(engine).items() if name.endswith(".master"))

    masters = []
    in_this_process(build)
    assert sum(float(t.detach().norm() ** 2) for t in masters) == pytest.approx(expected, rel=1e-4)


def test_the_heads_gradient_is_handed_over_by_the_backward():
    sums = SequenceLoss(tiny_llama(), packed=True)([token_sequence(r) for r in rollouts()])
    node = sums.grad_fn
    assert len(node.slopes) == 3
    sums[0].backward()
    assert node.slopes is None


def test_gradient_checkpointing_that_a_model_has_not_is_refused():
    model = tiny_llama()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=r"training\.gradient_checkpointing \(true\): .* set training\.grad.*=false"):
        keep_layer_inputs_only(model, "training")


def test_an_update_in_a_manifest_from_before_the_penalty_can_be_read():
    written = {"optimizer_steps": 1, "response_tokens": 2, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-5}
    assert StepUpdate(**written).kl is None
