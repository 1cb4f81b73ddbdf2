"""What an RS step takes on many GPUs: formulas over a case of `alignment.scaling_types`.

A phase takes what its slowest worker takes, and prompts go to workers whole, so that workers beyond the number of
prompts idle. Left out: attention's own arithmetic (a few per cent up to some thousand tokens), what tensor parallelism
sends, validations and the evaluation, queues of the cluster, and what DeepSpeed hides of its communication.
"""

import math

from alignment.scaling_memory import memory, rows_at_once, zero_stage
from alignment.scaling_types import ADAM, Case, Estimate, Memory

BUCKET = 5e8
"""Numbers that DeepSpeed reduces or gathers at a time under ZeRO 2: its default, reduce_bucket_size."""
SUMS = 2
"""Times that a checkpoint's writer sums it: for its manifest, and before an older checkpoint is removed."""


def estimate(case: Case) -> Estimate:
    """What the case's plan takes. Raises ConfigError where the model does not fit."""
    shape, plan, held = case.shape, case.plan, memory(case)
    parts, gpu_seconds, redone = phases(case, held)
    step = sum(parts.values())
    gpu_hours = (gpu_seconds + plan.reward_gpus * step) * shape.steps / 3600
    failures = case.costs.failures_per_gpu_hour * gpu_hours
    longer = 1 + failures * redone / (shape.steps * step)
    saves = math.ceil(shape.steps / (shape.save_interval if plan.colocated else 1))
    return Estimate(
        plan=plan,
        memory=held,
        parts=parts,
        idle_rollouts=1 - shape.prompts / (case.workers * case.prompts_each),
        idle_update=1 - shape.selected / (plan.update_gpus * math.prod(update_slots(case))),
        wall_hours=shape.steps * step * longer / 3600,
        gpu_hours=gpu_hours * longer,
        ideal_gpu_hours=ideal_gpu_seconds(case) * shape.steps / 3600,
        failures=failures,
        rollout_bytes=shape.steps * shape.rollouts * shape.response_tokens * case.costs.response_token_bytes,
        checkpoint_bytes=saves * case.model.checkpoint,
        weight_bytes=weight_bytes(case, held),
    )


def expected_slowest(workers: int, spread: float) -> float:
    """Mean of the largest of `workers` lognormal times of mean 1, where `spread` is the deviation of their logarithm.

    The integral over z of n φ(z) Φ(z)^(n−1) exp(spread z − spread²/2): the density of a maximum (David and Nagaraja,
    Order Statistics, 2003, section 2.1).
    """
    width, total = 0.01, 0.0
    for z in (width * k for k in range(-900, 1201)):
        below = 0.5 * math.erfc(-z / math.sqrt(2))
        density = workers * math.exp(-z * z / 2) / math.sqrt(2 * math.pi) * below ** (workers - 1)
        total += density * math.exp(spread * z - spread**2 / 2)
    return total * width


def ring_seconds(case: Case, payload: float, ranks: int, collectives: float) -> float:
    """All-gathers or reduce-scatters of `payload` bytes, all of it on each rank before or after, in `collectives`.

    A ring moves (n − 1)/n of it through every GPU; its n − 1 steps each have a latency, as in NCCL's own model
    (src/graph/tuning.cc, Ring, Simple: 3.4 µs over NVLink, 9.6 µs over a network).
    """
    hardware, costs, nodes = case.hardware, case.costs, case.nodes(ranks)
    slowest = hardware.nvlink if nodes == 1 else min(hardware.nvlink, hardware.network)
    hops = (ranks - nodes) * costs.hop_seconds + (nodes - 1) * costs.node_hop_seconds
    return payload * (ranks - 1) / ranks / (slowest * costs.network_share) + collectives * hops


def rollouts(case: Case, cache: float) -> dict[str, float]:
    """Seconds of the worker with the most prompts, by what bounds it: they overlap, and the longest is the phase's.

    A pass of the decoding reads all weights once, and the keys and values of its rows; there are as many passes as
    the rows that follow each other in one place have tokens, and at the end those of the longest response.
    """
    model, costs, shape, gpus = case.model, case.costs, case.shape, case.plan.tensor_parallel
    tokens = case.prompts_each * shape.samples * shape.response_tokens
    if costs.rollout_tokens_per_s:
        return {"a measured rate": tokens / costs.rollout_tokens_per_s}
    passes = waves(case, cache) * shape.response_tokens + shape.max_new_tokens - shape.response_tokens
    flops, bandwidth = gpus * case.hardware.flops, gpus * case.hardware.memory_bandwidth
    prefill = 2 * model.parameters * case.prompts_each * shape.prompt_tokens / (flops * costs.prefill_share)
    seen = tokens * model.kv_bytes * (shape.prompt_tokens + shape.response_tokens / 2)
    return {
        "arithmetic": prefill + 2 * model.parameters * tokens / (flops * costs.decode_share),
        "memory bandwidth": prefill + (passes * model.weights + seen) / (bandwidth * costs.bandwidth_share),
        "launches": prefill + passes * model.layers * costs.layer_seconds,
    }


def waves(case: Case, cache: float) -> float:
    """How often the worker with the most prompts fills its room for rows, at least once."""
    return max(1.0, case.prompts_each * case.shape.samples / rows_at_once(case, cache))


def scoring(case: Case) -> float:
    """Seconds in which the reward server reads all responses with their prompts."""
    rate = case.hardware.flops * case.costs.scoring_share / (2 * case.model.reward_parameters)
    return (
        case.shape.rollouts * case.shape.sequence / ((case.costs.scoring_tokens_per_s or rate) * case.plan.reward_gpus)
    )


def waiting(scoring_s: float, rollouts_s: float, waves: float) -> float:
    """Seconds of the scoring that do not overlap with rollouts: the last wave's responses come when all is sampled."""
    return max(scoring_s - rollouts_s * (1 - 1 / waves), scoring_s / waves)


def micro_batches(case: Case) -> int:
    """Of an optimizer step on each rank: those of a whole global batch, fillers where fewer responses are there."""
    return math.ceil(case.shape.global_batch_size / (case.shape.micro_batch_size * case.plan.update_gpus))


def update_slots(case: Case) -> tuple[int, int]:
    """Optimizer steps of an RS step, and the responses of each on the rank that has most; a filler counts as one."""
    batch = min(case.shape.global_batch_size, case.shape.selected)
    each = max(math.ceil(batch / case.plan.update_gpus), micro_batches(case))
    return math.ceil(case.shape.selected / case.shape.global_batch_size), each


def update(case: Case, held: Memory) -> tuple[float, float]:
    """Seconds of arithmetic and of communication; every rank takes as many micro-batches as the fullest."""
    optimizer_steps, each = update_slots(case)
    flop = (8 if held.recompute else 6) * case.model.parameters
    rate = case.costs.update_tokens_per_s or case.hardware.flops * case.costs.update_share / flop
    return optimizer_steps * each * case.shape.sequence / rate, update_network(case)


def update_network(case: Case) -> float:
    """Seconds of an RS step's collectives between the ranks that train.

    Under ZeRO 3 weights are gathered twice and gradients scattered once per micro-batch (ZeRO, section 7). Under ZeRO 2
    DeepSpeed scatters gradients at each micro-batch's backward pass too, and gathers weights once per optimizer step.
    """
    model, often = case.model, micro_batches(case)
    if zero_stage(case) == 3:
        times, cuts = 3 * often, model.layers
    else:
        times, cuts = often + 1, math.ceil(model.parameters / BUCKET)
    network = ring_seconds(case, times * model.weights, case.plan.update_gpus, times * cuts)
    return update_slots(case)[0] * network


def phases(case: Case, held: Memory) -> tuple[dict[str, float], float, float]:
    """An RS step's seconds by part, the GPU-seconds that policy GPUs are held for it, and what a failure repeats."""
    shape, plan, costs = case.shape, case.plan, case.costs
    bounds = rollouts(case, held.cache)
    limit = max(bounds, key=lambda name: bounds[name])
    sampled = bounds[limit] * expected_slowest(min(case.workers, shape.prompts), costs.straggling)
    scored, (arithmetic, network) = scoring(case), update(case, held)
    arithmetic *= expected_slowest(plan.update_gpus, costs.straggling)
    saved, nodes = saving(case), case.nodes(plan.gpus)
    parts = {f"rollouts: {limit}": sampled, "update: arithmetic": arithmetic, "update: network": network}
    if plan.colocated:
        loaded = loading(case, nodes)
        parts["scoring"] = waiting(scored, sampled, waves(case, held.cache))
        parts["weights"] = copying(case, held) + loaded / shape.steps_per_iteration
        parts["checkpoints"] = saved / shape.save_interval
        parts["starting"] = (costs.task_seconds + costs.worker_seconds) / shape.steps_per_iteration
        step = sum(parts.values())
        return parts, plan.gpus * step, shape.save_interval / 2 * step + costs.worker_seconds + loaded
    loads = loading(case, nodes), loading(case, case.nodes(plan.update_gpus))
    parts |= {"scoring": scored, "weights": sum(loads), "checkpoints": saved, "starting": costs.disaggregated_seconds}
    starting = costs.disaggregated_seconds / 2  # of each phase that holds GPUs
    gpu_seconds = plan.gpus * (sampled + loads[0] + starting)
    gpu_seconds += plan.update_gpus * (arithmetic + network + loads[1] + saved + starting)
    return parts, gpu_seconds, sum(parts.values()) / 2


def copying(case: Case, held: Memory) -> float:
    """Seconds until ZeRO 3's new weights are in the copies to sample from.

    Each GPU of a copy takes in its part, so that a node takes in all of the weights where other nodes hold some.
    """
    if not held.copy:
        return 0.0
    taken_in = held.copy if case.nodes(case.plan.gpus) == 1 else case.model.weights
    return ring_seconds(case, taken_in, case.plan.gpus, case.model.layers)


def weight_bytes(case: Case, held: Memory) -> float:
    """Bytes that all nodes take in for an RS step; of `copying` what comes from other nodes, each holding a share."""
    plan, model, nodes = case.plan, case.model, case.nodes(case.plan.gpus)
    if not plan.colocated:
        return (nodes + case.nodes(plan.update_gpus)) * model.checkpoint
    copied = (nodes - 1) * model.weights if held.copy else 0.0
    return nodes * model.checkpoint / case.shape.steps_per_iteration + copied


def loading(case: Case, nodes: int) -> float:
    """Seconds until `nodes` have read and verified a checkpoint: each reads all of it, and each process sums all."""
    rate = min(case.hardware.node_storage, case.hardware.storage / nodes)
    return case.model.checkpoint / rate + case.model.checkpoint / case.costs.hash_bytes_per_s


def saving(case: Case) -> float:
    """Seconds of a checkpoint: one node writes the weights, all their AdamW state, then one process reads and sums.

    It sums all of it `SUMS` times; what its own node wrote need not be read again.
    """
    model, hardware, nodes = case.model, case.hardware, case.nodes(case.plan.update_gpus)
    adam = ADAM * model.parameters
    written = model.weights / hardware.node_storage + adam / min(nodes * hardware.node_storage, hardware.storage)
    read = adam * (nodes - 1) / nodes / hardware.node_storage
    return written + read + SUMS * model.checkpoint / case.costs.hash_bytes_per_s


def ideal_gpu_seconds(case: Case) -> float:
    """GPU-seconds of an RS step's work, none ever waiting, and weights read for as many rows as one likes."""
    model, hardware, costs, shape = case.model, case.hardware, case.costs, case.shape
    tokens, flop = shape.rollouts * shape.response_tokens, 2 * model.parameters / hardware.flops
    if costs.rollout_tokens_per_s:
        sampled = tokens * case.plan.tensor_parallel / costs.rollout_tokens_per_s
    else:
        seen = tokens * model.kv_bytes * (shape.prompt_tokens + shape.response_tokens / 2)
        cached = seen / (hardware.memory_bandwidth * costs.bandwidth_share)
        sampled = max(flop * tokens / costs.decode_share, cached)
        sampled += flop * shape.prompts * shape.prompt_tokens / costs.prefill_share
    trained = shape.selected * shape.sequence / (costs.update_tokens_per_s or costs.update_share / (3 * flop))
    return sampled + trained + scoring(case) * case.plan.reward_gpus
