"""Carriers of the simulator in `alignment.scaling`: a case (model, hardware, costs, shape, plan) and its estimate.

Bytes, seconds and FLOP throughout, weights in bfloat16. docs/scaling.md says which defaults are measured.
"""

from dataclasses import dataclass

BF16, ADAM = 2, 12
"""Bytes a parameter: the weights, or a gradient; AdamW's two moments with the float32 weights."""


@dataclass(frozen=True)
class Model:
    """A decoder with grouped-query attention; `reward_parameters` are those of the model that scores it."""

    name: str
    parameters: float
    layers: int
    hidden: int
    key_heads: int
    head_size: int
    reward_parameters: float

    @property
    def weights(self) -> float:
        """Bytes of the weights."""
        return BF16 * self.parameters

    @property
    def checkpoint(self) -> float:
        """Bytes of a checkpoint."""
        return (BF16 + ADAM) * self.parameters

    @property
    def kv_bytes(self) -> float:
        """Bytes of a token's keys and values in all layers."""
        return 2 * self.layers * self.key_heads * self.head_size * BF16


MODELS = {
    "1B": Model("1B", 1.24e9, 16, 2048, 8, 64, 1.24e9),
    "8B": Model("8B", 8.03e9, 32, 4096, 8, 128, 8.03e9),
    "70B": Model("70B", 70.6e9, 80, 8192, 8, 128, 8.03e9),
}
"""The shapes of Llama 3.2 1B, Llama 3.1 8B and 70B (their config.json)."""


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal nodes; the defaults are DGX H100's (NVIDIA's data sheets)."""

    flops: float = 989e12
    """FLOP/s of a GPU, dense bfloat16."""
    memory_bandwidth: float = 3.35e12
    """Bytes/s of a GPU's memory."""
    memory: float = 80e9
    """Bytes of a GPU's memory."""
    nvlink: float = 450e9
    """Bytes/s from a GPU to the others of its node, one way."""
    network: float = 400e9
    """Bytes/s from a node to others, one way: eight adapters of 400 Gb/s. Rings use all at once."""
    node: int = 8
    """GPUs of a node."""
    node_storage: float = 2e9
    """Bytes/s between a node and the shared file system."""
    storage: float = 50e9
    """Bytes/s of the shared file system, all nodes together."""


@dataclass(frozen=True)
class Costs:
    """What is measured, or assumed until it is: shares of the hardware's peaks, seconds, rates."""

    prefill_share: float = 0.5
    """Share of peak FLOP/s while prompts are read."""
    decode_share: float = 0.5
    """Share of peak FLOP/s that decoding reaches with many rows."""
    bandwidth_share: float = 0.6
    """Share of the memory's bandwidth that decoding reaches with few rows."""
    layer_seconds: float = 1e-4
    """Seconds that launching one layer's kernels takes: no pass of the decoding is shorter than its layers'."""
    update_share: float = 0.4
    """Share of peak FLOP/s in forward and backward passes."""
    scoring_share: float = 0.4
    """Share of peak FLOP/s of the reward server."""
    network_share: float = 0.8
    """Share of NVLink's or the network's bandwidth that collectives reach."""
    hash_bytes_per_s: float = 1.4e9
    """Bytes/s that one process sums with sha256: all of a checkpoint, by who saves it and by whoever loads it."""
    hop_seconds: float = 3.4e-6
    """Latency of a ring's step inside a node."""
    node_hop_seconds: float = 9.6e-6
    """Latency of a ring's step between nodes."""
    memory_share: float = 0.9
    """Share of a GPU's memory that can be planned with; the rest are buffers, fragments, CUDA itself."""
    straggling: float = 0.05
    """Spread of equal work's time over workers: standard deviation of its logarithm, for rollouts and updates."""
    task_seconds: float = 2.0
    """Seconds until a Metaflow task runs."""
    worker_seconds: float = 60.0
    """Seconds until workers are ready for weights: imports, process groups, engines."""
    disaggregated_seconds: float = 130.0
    """What starting the phases of one RS step takes in the disaggregated executor, loading apart."""
    failures_per_gpu_hour: float = 2e-5
    """Interruptions of a run per hour and GPU."""
    response_token_bytes: float = 5.0
    """Bytes of the rollouts' file per response token, all columns included."""
    rollout_tokens_per_s: float | None = None
    """Measured: tokens a second that one worker generates alone, reading prompts included; else by the formulas."""
    update_tokens_per_s: float | None = None
    """Measured: tokens of prompts and responses a second that one worker trains on alone; else by the formulas."""
    scoring_tokens_per_s: float | None = None
    """Measured: tokens of prompts and responses a second that one reward GPU scores; else by the formulas."""


@dataclass(frozen=True)
class Shape:
    """An RS step and a run, as the config has them."""

    prompts: int = 1024
    samples: int = 8
    kept: int = 1
    """Responses trained on per prompt."""
    prompt_tokens: float = 512
    response_tokens: float = 512
    """Mean of a response."""
    max_new_tokens: int = 1024
    """The longest response, which decides when the last worker is done."""
    global_batch_size: int = 1024
    micro_batch_size: int = 4
    steps: int = 200
    save_interval: int = 20
    steps_per_iteration: int = 20

    @property
    def rollouts(self) -> int:
        """Responses of an RS step."""
        return self.prompts * self.samples

    @property
    def selected(self) -> int:
        """Responses trained on in an RS step."""
        return self.prompts * self.kept

    @property
    def sequence(self) -> float:
        """Tokens of a prompt and its response, mean."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True)
class Plan:
    """How many GPUs do what."""

    gpus: int
    """That sample; colocated they train too, disaggregated each is a shard."""
    update_gpus: int
    reward_gpus: int
    """Of an external reward server, besides; held for the whole run."""
    tensor_parallel: int
    """GPUs that hold one copy of the weights to sample from."""
    colocated: bool


@dataclass(frozen=True)
class Case:
    """All that an estimate is made from."""

    model: Model
    hardware: Hardware
    costs: Costs
    shape: Shape
    plan: Plan

    @property
    def workers(self) -> int:
        """Copies of the policy that sample."""
        return self.plan.gpus // self.plan.tensor_parallel

    @property
    def prompts_each(self) -> int:
        """Prompts of the worker that has most."""
        return -(-self.shape.prompts // self.workers)

    @property
    def usable(self) -> float:
        """Bytes of a GPU's memory to plan with."""
        return self.hardware.memory * self.costs.memory_share

    def nodes(self, gpus: int) -> int:
        """Nodes that hold so many GPUs."""
        return -(-gpus // self.hardware.node)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU: what stays (training state, copy to sample from) and what comes and goes."""

    zero_stage: int
    recompute: bool
    """Whether layers are computed again for their backward pass."""
    state: float
    copy: float
    activations: float
    cache: float
    """What is left for keys and values while nothing is trained."""


@dataclass(frozen=True)
class Estimate:
    """An RS step's seconds by part, and what a run of such steps takes. `idle_*`: shares of slots that stay empty."""

    plan: Plan
    memory: Memory
    parts: dict[str, float]
    """Seconds of an RS step by what they are spent on; their sum is the step."""
    idle_rollouts: float
    idle_update: float
    wall_hours: float
    gpu_hours: float
    ideal_gpu_hours: float
    """Of the same work at the same shares of the peaks, were no GPU ever to wait, start, or move weights."""
    failures: float
    """Interruptions to expect in the run; what they cost is in the hours."""
    rollout_bytes: float
    """Written in the run."""
    checkpoint_bytes: float
    """Written in the run."""
    weight_bytes: float
    """That all nodes together take in for an RS step: checkpoints that they load, weights for copies to sample from."""

    @property
    def step_seconds(self) -> float:
        """Of one RS step."""
        return sum(self.parts.values())

    @property
    def efficiency(self) -> float:
        """Share of the GPU-hours that perfect scaling would take."""
        return self.ideal_gpu_hours / self.gpu_hours

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])
