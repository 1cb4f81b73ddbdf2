"""The DeepSpeed engine around a policy: set-up, learning rate, and optimizer state as plain tensors.

No C++ is compiled on a CPU: the optimizer is torch's own AdamW, and DeepSpeed's shared-memory
communication op, which it would otherwise build at the first use of gloo, is declared unavailable.
"""

import atexit
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignment.config_sections import TrainingSection
from alignment.errors import CheckpointError
from alignment.one_node import store_url
from models.batching import ResponseBatch, response_logits
from models.losses import response_loss_sum
from models.memory import keep_freed_memory


class ResponseLoss(nn.Module):
    """A policy as a module whose forward is the summed response loss: what the engine wraps."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: ResponseBatch) -> Tensor:
        """Cross-entropy summed over the batch's response tokens, in nats; a scalar."""
        return response_loss_sum(response_logits(self.policy, batch), batch.targets, batch.response_mask)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int


def start_ranks(*, threads: int, gpu: bool) -> Ranks:
    """Join the process group that torch.distributed.run describes in the environment."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpu else "cpu")  # the flow has set it already
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    torch.set_num_threads(threads)
    keep_freed_memory()
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if gpu else "gloo",
        init_method=store_url(),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        verbose=False,
    )
    # Gloo's threads must end before the interpreter does: else the process may abort after its work is done.
    atexit.register(torch.distributed.destroy_process_group)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())


def gradient_accumulation_steps(training: TrainingSection, world_size: int) -> int:
    """Micro-batches per rank that hold a whole global batch."""
    return math.ceil(math.ceil(training.global_batch_size / training.micro_batch_size) / world_size)


def build_engine(model: nn.Module, training: TrainingSection, *, world_size: int) -> Any:
    """A DeepSpeed engine over `ResponseLoss(model)` with torch's AdamW at the section's settings."""
    import deepspeed

    module = ResponseLoss(model)
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=training.lr,
        betas=(training.beta1, training.beta2),
        weight_decay=training.weight_decay,
        fused=True,  # one pass over memory; on a CPU the loop over tensors takes several times as long
    )
    settings = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps(training, world_size),
        "gradient_clipping": training.gradient_clip,
        "zero_optimization": {"stage": training.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": next(module.parameters()).dtype == torch.bfloat16},
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def learning_rate(step: int, training: TrainingSection, *, max_steps: int) -> float:
    """The rate of RS step `step` (from 1): linear warm-up, then the schedule over the steps that are left.

    A function of RS progress alone, so that a resume needs no scheduler state.
    """
    if step <= training.warmup_steps:
        return training.lr * step / training.warmup_steps
    if training.lr_schedule == "constant":
        return training.lr
    progress = (step - training.warmup_steps - 1) / max(1, max_steps - training.warmup_steps - 1)
    factor = 1 - progress if training.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return training.min_lr + (training.lr - training.min_lr) * factor


def optimizer_tensors(engine: Any) -> dict[str, Tensor]:
    """This rank's optimizer state as `<parameter>.<name>` tensors; ZeRO's fp32 masters as `<parameter>.master`."""
    optimizer = engine.basic_optimizer
    state: Mapping[int, Mapping[str, Any]] = optimizer.state_dict()["state"]
    tensors = {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
        tensors |= {f"{i}.master": p.detach() for i, p in enumerate(_parameters(optimizer))}
    return tensors


def restore_optimizer(engine: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave. Raises CheckpointError where it does not fit."""
    optimizer = engine.basic_optimizer
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        if int(index) >= len(parameters) or (tensor.dim() and tensor.shape != parameters[int(index)].shape):
            raise CheckpointError(
                f"optimizer state {key} {tuple(tensor.shape)} does not fit this engine: "
                "resume with the model, training.zero_stage and number of workers that wrote it"
            )
        if name == "master":
            parameters[int(index)].data.copy_(tensor)
        else:
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
