"""On a GPU: rollouts as on a CPU, memory that CUDA refuses, and updates in bfloat16 against plain ones in float64.

    DS_ACCELERATOR=cuda python -m pytest --noconftest -m gpu tests/test_gpu.py

They need torch, transformers, deepspeed, peft and pydantic, and none of what serves a reward model.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from alignment.config_training import TrainingSection
from alignment.embedded import policy_folder
from alignment.engine import Ranks, build_engine, optimizer_tensors
from alignment.hosted_optimizer import HostedOptimizer
from alignment.rollouts import Lowered, generate
from alignment.types import Prompt, Rollout, StepUpdate
from alignment.update import update
from benchmarks.update_setup import alone, start_alone
from models import memory
from models.packing import packing_leak
from models.policy import Policy, load_policy
from models.sampling import Sampling
from models.sequence_loss import SequenceLoss
from side_by_side import half_precision_distances, sample
from tiny import EOS, VOCABULARY, random_rows, tiny_llama
from update_ranks import BASE_SEED, plain_gradient, rollouts, with_adapters

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")]

DEVICE = "cuda"
EDGES = 0.01
"""Share of responses that may differ: a draw at the edge of two tokens turns with rounding, and the rest with it."""
TOLERANCE = 0.06
"""Distance of a gradient in bfloat16 from the exact one, over that one's norm; 0.035 on a CPU, 0.037 with adapters."""


def narrow_mistral() -> MistralForCausalLM:
    """A model whose rows keep a copy of their prompts: its window is shorter than a response."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": EOS, "vocab_size": VOCABULARY}
    config = MistralConfig(**sizes, **special, num_key_value_heads=2, sliding_window=4, initializer_range=0.3)
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("build", [tiny_llama, narrow_mistral])
def test_in_float32_responses_are_those_of_the_cpu(build: Any) -> None:
    prompts = random_rows([3, 9, 5, 1, 7, 7, 2, 12])
    numbers = torch.rand(8, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for sampling, allowed in (
        (Sampling(24, temperature=0), 0.0),
        (Sampling(24), EDGES),
        (Sampling(24, 3, top_p=0.9), EDGES),
    ):
        on_cpu, on_gpu = (
            sample(build().to(device), prompts, numbers, sampling, eos_ids=[EOS]) for device in ("cpu", DEVICE)
        )
        pairs = [(a, b) for one, other in zip(on_cpu, on_gpu, strict=True) for a, b in zip(one, other, strict=True)]
        different = sum(a.token_ids != b.token_ids for a, b in pairs)
        assert different <= allowed * len(pairs), f"{sampling}: {different} of {len(pairs)} responses differ"
        for a, b in pairs:
            if a.token_ids == b.token_ids:
                assert a.finish_reason == b.finish_reason
                assert a.log_probs == pytest.approx(b.log_probs, abs=1e-3)


def test_in_bfloat16_log_probabilities_are_as_near_a_full_pass_as_its_rounding() -> None:
    found = half_precision_distances(DEVICE)
    assert found["ours to exact"] < 1.2 * found["trainer to exact"]
    assert found["ours to trainer"] < 0.04


PROMPTS = [Prompt(str(i), ({"role": "user", "content": "x" * (i + 1)},)) for i in range(32)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """A reader of bytes, and a model whose keys and values take 8 KB a token."""
    reader = load_policy(policy_folder("tiny", tmp_path_factory.mktemp("cache")), prompt_format="text")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=reader.model.config.vocab_size)
    return replace(reader, model=LlamaForCausalLM(config).eval().to(DEVICE))


def drawn(policy: Policy, **others: Any) -> dict[tuple[str, int], Rollout]:
    how = {"samples_per_prompt": 32, "sampling": Sampling(128), "batch_tokens": 200_000, "stream": "test"}
    return {(r.prompt_id, r.rollout_index): r for some in generate(policy, PROMPTS, **how, **others) for r in some}


def test_memory_that_cuda_refuses_is_answered_by_half_of_the_tokens(policy: Policy) -> None:
    drawn(policy)  # what libraries take at their first use
    memory.release_memory()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    expected = drawn(policy)
    needed = torch.cuda.max_memory_allocated() - held
    assert needed > 2**30
    memory.release_memory()
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(free - int(0.75 * needed), dtype=torch.uint8, device=DEVICE)
    errors: list[BaseException] = []
    notes: list[str] = []
    lowered, real = Lowered(), memory.is_out_of_memory

    def watched(error: BaseException) -> bool:
        errors.append(error)
        return real(error)

    with patch.object(memory, "is_out_of_memory", watched):
        got = drawn(policy, on_note=notes.append, lowered=lowered)
    del filler
    assert [type(error) for error in errors] == [torch.OutOfMemoryError]
    assert len(notes) == 1 and f" begin anew with {lowered.tokens} tokens side by side" in notes[0]
    assert lowered.tokens < 100_000
    assert got.keys() == expected.keys()
    different = sum(got[key].response_ids != expected[key].response_ids for key in expected)
    assert different <= EDGES * len(expected), f"{different} of {len(expected)} responses differ"


def test_released_memory_goes_back_to_the_card() -> None:
    block = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    before = torch.cuda.memory_reserved()
    del block
    assert torch.cuda.memory_reserved() == before  # torch keeps it for later
    memory.release_memory()
    assert torch.cuda.memory_reserved() <= before - 2**28


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    """For the whole module: under ZeRO-3 DeepSpeed reads the rank's environment at each step."""
    threads = torch.get_num_threads()
    with alone():
        start_alone(1, gpu=DEVICE == "cuda")
        yield
    torch.set_num_threads(threads)


def half(seed: int = 0) -> LlamaForCausalLM:
    return tiny_llama(seed).to(torch.bfloat16)


def engine_of(training: TrainingSection, **others: Any) -> Any:
    """The engine of a worker on a GPU, around the tiny policy in bfloat16."""
    model = half()
    if training.lora_rank:
        model = with_adapters(model, training)
    base = half(BASE_SEED).to(DEVICE) if training.kl_penalty and not training.lora_rank else None
    packed = packing_leak(half().to(DEVICE)) == 0
    loss = SequenceLoss(model.to(DEVICE), packed=packed, base=base, kl_penalty=training.kl_penalty)
    return build_engine(loss, training, zero_stage=training.zero_stage, world_size=1)


def masters(engine: Any) -> dict[str, torch.Tensor]:
    """The trained weights as AdamW steps on them, in float32."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in engine.module.policy.named_parameters():
        if parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter)
            found[name] = (parameter if whole is None else whole).detach().float().cpu().clone()
    return found


def stepped(**settings: Any) -> tuple[dict[str, torch.Tensor], StepUpdate, Any]:
    """The gradient, which SGD with rate 1 in AdamW's place moves the weights by; the result, and the engine."""
    training = TrainingSection(gradient_clip=1e9, global_batch_size=8, micro_batch_size=2, **settings)
    with patch.object(torch.optim, "AdamW", lambda parameters, **_: torch.optim.SGD(parameters, lr=1.0)):
        engine = engine_of(training)
    before = masters(engine)
    result = update(engine, rollouts(), training, Ranks(0, 1), lr=1.0, stream="test")
    after = masters(engine)
    return {name: before[name] - after[name] for name in before}, result, engine


def distance(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Over the norm of what was expected."""
    assert got.keys() == expected.keys()
    off = torch.stack([(got[name] - expected[name]).norm() for name in got]).norm()
    return float(off / torch.stack([g.norm() for g in expected.values()]).norm())


KL, LORA = {"kl_penalty": 0.3}, {"kl_penalty": 0.3, "lora_rank": 2}
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "zero 1": {"zero_stage": 1},
    "zero 2": {"zero_stage": 2},
    "zero 3": {"zero_stage": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "kl": KL,
    "kl, zero 2": {**KL, "zero_stage": 2},
    "lora, kl": LORA,
    "lora, kl, zero 2": {**LORA, "zero_stage": 2},
    "offload, zero 1": {"offload_optimizer": True, "zero_stage": 1},
    "offload, zero 2": {"offload_optimizer": True, "zero_stage": 2},
    "offload, zero 3": {"offload_optimizer": True, "zero_stage": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_in_bfloat16_is_that_of_one_plain_backward_to_rounding(way: str) -> None:
    settings = WAYS[way]
    model: Any = half()
    if "lora_rank" in settings:
        model = with_adapters(model, TrainingSection(**settings))
    base = half().double() if "lora_rank" in settings else half(BASE_SEED).double()
    expected, loss, kl = plain_gradient(rollouts(), settings.get("kl_penalty", 0.0), model=model, base=base)
    got, result, _ = stepped(**settings)
    assert distance(got, {name: g.float() for name, g in expected.items()}) < TOLERANCE
    assert result.loss == pytest.approx(loss, rel=0.01)
    if settings.get("kl_penalty"):
        assert result.kl == pytest.approx(kl, rel=0.05)


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_an_optimizer_on_the_host_lies_in_pinned_memory_and_steps_as_one_on_the_card(zero_stage: int) -> None:
    there, _, engine = stepped(offload_optimizer=True, zero_stage=zero_stage)
    own = [t for name, t in optimizer_tensors(engine).items() if name.endswith(".master")]
    assert own and all(t.device.type == "cpu" and t.is_pinned() for t in own)
    here, _, _ = stepped(zero_stage=zero_stage)
    assert distance(there, here) < 1e-3


@pytest.mark.parametrize("settings", [{}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}, {"lora_rank": 2}])
def test_state_that_leaves_for_rollouts_frees_its_memory_and_changes_no_bit(settings: dict[str, Any]) -> None:
    training = TrainingSection(lr=1e-2, micro_batch_size=2, **settings)
    ends = []
    for moved in (False, True):
        engine = engine_of(training)
        hosted = HostedOptimizer(engine)
        for step in range(3):
            update(engine, rollouts(), training, Ranks(0, 1), lr=training.lr, stream=f"step-{step}")
            if moved:
                held = torch.cuda.memory_allocated()
                freed = hosted.put_away()
                assert freed > 0 and held - torch.cuda.memory_allocated() >= freed
                assert all(copy.is_pinned() for copy in hosted._copies.values())
                hosted.bring_back()
        ends.append({**masters(engine), **{name: t.cpu().clone() for name, t in optimizer_tensors(engine).items()}})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
