"""Whether a case of the simulator fits in its GPUs' memory, and what is left there for keys and values."""

from alignment.errors import ConfigError
from alignment.scaling_types import ADAM, BF16, Case, Hardware, Memory, Model

STATE = 2 * BF16 + ADAM
"""Weights, gradients and AdamW: 16 bytes a parameter (Rajbhandari et al., ZeRO, 2020, section 3.1)."""


def zero_stage(case: Case) -> int:
    """ZeRO 2 samples from the weights it trains; ZeRO 3 from a copy, which on one GPU makes it the larger of the two.

    So ZeRO 3 is for models whose copy takes several GPUs.
    """
    return 2 if case.plan.tensor_parallel == 1 else 3


def training_state(parameters: float, stage: int, ranks: int) -> float:
    """Bytes of weights, gradients and AdamW on each of `ranks` under a ZeRO stage, 0 to 3 (ZeRO, figure 1)."""
    sharded = {0: 0, 1: ADAM, 2: ADAM + BF16, 3: STATE}[stage]
    return (STATE - sharded) * parameters + sharded * parameters / ranks


def activations(model: Model, tokens: float, *, recompute: bool) -> float:
    """Bytes that a forward pass keeps for `tokens`: 34 times the hidden size a layer, attention's own maps not kept.

    Korthikanti et al., Reducing Activation Recomputation, 2022, equation 2. With `recompute`, each layer's input
    and one layer.
    """
    layer = 34 * model.hidden * tokens
    return model.layers * BF16 * model.hidden * tokens + layer if recompute else model.layers * layer


def gpus_per_copy(model: Model, hardware: Hardware) -> int:
    """The fewest GPUs of a node, a power of two, of whose memory the weights take a quarter at most."""
    gpus = 1
    while gpus < hardware.node and model.weights / gpus > hardware.memory / 4:
        gpus *= 2
    return gpus


def memory(case: Case) -> Memory:
    """How the GPUs that train hold it all, and sample too where colocated. Raises ConfigError where they cannot."""
    model, shape, plan, stage = case.model, case.shape, case.plan, zero_stage(case)
    copy = model.weights / plan.tensor_parallel
    state = training_state(model.parameters, stage, plan.update_gpus)
    training = state + (copy if stage == 3 else 0.0)
    cache = case.usable - (training if plan.colocated else copy)
    if not rows_at_once(case, cache):
        remedy = f"take more GPUs, or a larger plan.tensor_parallel (now {plan.tensor_parallel})"
        if not plan.colocated:
            remedy = "a shard of the disaggregated executor samples on one GPU. Take --executor colocated"
        raise ConfigError(
            f"{plan.gpus} GPUs: {model.name} leaves {max(0.0, cache) / 1e9:.0f} of {case.usable / 1e9:.0f} GB on each "
            f"for keys and values: {remedy}"
        )
    tokens = shape.micro_batch_size * (shape.prompt_tokens + shape.max_new_tokens)
    for recompute in (False, True):
        kept = activations(model, tokens, recompute=recompute)
        if training + kept <= case.usable:
            return Memory(stage, recompute, state, training - state, kept, cache)
    raise ConfigError(
        f"{plan.update_gpus} GPUs: to train {model.name} each would hold {(training + kept) / 1e9:.0f} GB of "
        f"{case.usable / 1e9:.0f}: take more GPUs, or a smaller shape.micro_batch_size (now {shape.micro_batch_size})"
    )


def rows_at_once(case: Case, cache: float) -> int:
    """Responses whose keys and values fit in `cache` bytes on each of a copy's GPUs; samples share their prompt's."""
    row = case.model.kv_bytes * (case.shape.max_new_tokens + case.shape.prompt_tokens / case.shape.samples)
    return max(0, int(cache * case.plan.tensor_parallel / row))
