"""The DeepSpeed engine around a policy or a reward model: set-up, one optimizer step, optimizer state as plain tensors.

An engine's module is a loss: its forward gives the summed loss of a micro-batch, and whatever else is to be summed up
and recorded. DeepSpeed averages over ranks and
divides by the accumulation steps, so each micro-batch is scaled by world_size × accumulation / N, where N counts what
the optimizer step's loss is a mean of, over all ranks: the gradient does not depend on micro-batches or ranks.

No C++ is compiled on a CPU: the optimizer is torch's own AdamW, and DeepSpeed's shared-memory
communication op, which it would otherwise build at the first use of gloo, is declared unavailable.
"""

import atexit
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignment.config_training import OptimizerSection
from alignment.errors import CheckpointError, ConfigError, TrainingError
from alignment.one_node import store_url
from models.memory import keep_freed_memory


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
    atexit.register(_leave_ranks)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())


def any_rank(flag: bool, ranks: Ranks, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    if ranks.world_size == 1:
        return flag
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags)


def _leave_ranks() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def gradient_accumulation_steps(section: OptimizerSection, world_size: int) -> int:
    """Micro-batches per rank that hold a whole global batch."""
    return math.ceil(math.ceil(section.global_batch_size / section.micro_batch_size) / world_size)


def build_engine(module: nn.Module, section: OptimizerSection, *, zero_stage: int, world_size: int) -> Any:
    """A DeepSpeed engine over a loss module with torch's AdamW on its trainable parameters."""
    import deepspeed

    trainable = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable,
        lr=0.0,  # `begin_step` sets it; the step on zeros that is told of below must not decay the weights
        betas=(section.beta1, section.beta2),
        weight_decay=section.weight_decay,
        fused=True,  # one pass over memory; on a CPU the loop over tensors takes several times as long
    )
    if section.gradient_checkpointing:
        keep_layer_inputs_only(module, section.key)
    settings = engine_settings(section, zero_stage=zero_stage, world_size=world_size, dtype=trainable[0].dtype)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    if world_size == 1 and zero_stage == 0 and trainable[0].dtype == torch.float32:
        engine.enable_backward_allreduce = False  # it would copy all gradients out and back, to sum them with nobody's
    # In bf16 without ZeRO, DeepSpeed makes the moments by a step on zeros: counted, it would halve the first update.
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
    return engine


def engine_settings(
    section: OptimizerSection, *, zero_stage: int, world_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """DeepSpeed's config of a training in `dtype`."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if section.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": section.micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps(section, world_size),
        "gradient_clipping": section.gradient_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would be compiled
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 2**31,
    }


def keep_layer_inputs_only(module: nn.Module, section: str) -> None:
    """Gradient checkpointing in the transformers models of a loss module. Raises ConfigError where one has none."""
    from transformers import PreTrainedModel

    for model in module.modules():
        if isinstance(model, PreTrainedModel):
            if not model.supports_gradient_checkpointing:
                raise ConfigError(
                    f"{section}.gradient_checkpointing (true): {type(model).__name__} has none in transformers: set "
                    f"{section}.gradient_checkpointing=false"
                )
            model.gradient_checkpointing_enable({"use_reentrant": False})


def begin_step(engine: Any, *, lr: float, stream: str) -> None:
    """Training mode, the rate of the step, and dropout's randomness, which `stream` names: it has no state to save."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "big"))
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.train()


def optimizer_step(
    engine: Any, micro_batches: Sequence[tuple[Any, float]], *, count: int, ranks: Ranks, section: str
) -> tuple[list[float], float]:
    """One optimizer step over this rank's micro-batches, each with its weight; 0 where only the backward must run.

    All ranks bring equally many. `count` is what the loss is a mean of, over all ranks. Returns what the module gives,
    the loss first, summed over all ranks, and the global gradient norm before clipping. Raises TrainingError naming
    `section` where one of them is not finite: under ZeRO, which knows its norm only after the step, the weights in
    memory have then changed.
    """
    scale = ranks.world_size * len(micro_batches) / count
    total, norm = torch.zeros((), device=engine.device), None
    for batch, weight in micro_batches:
        sums = engine(batch) * weight
        total = total + sums.detach()
        engine.backward(sums.flatten()[0] * scale)
        del sums  # and with it the graph, before AdamW needs the memory
        if engine.is_gradient_accumulation_boundary():
            norm = _unclipped_norm(engine)
            check_finite(norm, "gradient norm", section)
        engine.step()
    if ranks.world_size > 1:
        torch.distributed.all_reduce(total)
    norm = float(engine.get_global_grad_norm()) if norm is None else norm
    check_finite(norm, "gradient norm", section)
    parts: list[float] = total.flatten().tolist()
    check_finite(parts[0], "loss", section)
    return parts, norm


def check_finite(value: float | None, what: str, section: str) -> None:
    """Raise TrainingError for a number, if there is one, that is not finite."""
    if value is not None and not math.isfinite(value):
        raise TrainingError(
            f"the {what} is {value}: training diverged. Lower {section}.lr, then start a new run; "
            "the checkpoints so far are intact"
        )


def _unclipped_norm(engine: Any) -> float | None:
    """The global gradient norm of a plain fp32 engine at its boundary; the other engines report their own.

    Without ZeRO in fp32, DeepSpeed clips with torch and keeps no record of the norm.
    """
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


def learning_rate(step: int, training: OptimizerSection, *, total_steps: int) -> float:
    """The rate of step `step` (from 1) of `total_steps`: linear warm-up, the schedule, `constant_steps` at `min_lr`.

    Without these the schedule's end lies one step beyond the last, which would otherwise learn nothing where `min_lr`
    is 0. A function of progress alone, so that a resume needs no scheduler state.
    """
    if step <= training.warmup_steps:
        return training.lr * step / training.warmup_steps
    if training.lr_schedule == "constant":
        return training.lr
    last = total_steps + 1 - training.constant_steps  # the first at `min_lr`
    if step >= last:
        return training.min_lr
    progress = (step - training.warmup_steps - 1) / (last - training.warmup_steps - 1)
    factor = 1 - progress if training.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return training.min_lr + (training.lr - training.min_lr) * factor


def optimizer_tensors(engine: Any) -> dict[str, Tensor]:
    """This rank's optimizer state as `<parameter>.<name>` tensors; ZeRO's fp32 masters as `<parameter>.master`."""
    state, masters = engine.basic_optimizer.state, engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled()
    tensors: dict[str, Tensor] = {}
    for i, parameter in enumerate(_parameters(engine)):
        tensors |= {f"{i}.{name}": torch.as_tensor(value) for name, value in state.get(parameter, {}).items()}
        if masters:
            tensors[f"{i}.master"] = parameter.detach()
    return tensors


def restore_optimizer(engine: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave. Raises CheckpointError where it does not fit."""
    parameters, state = _parameters(engine), engine.basic_optimizer.state
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        if int(index) >= len(parameters) or (tensor.dim() and tensor.shape != parameters[int(index)].shape):
            raise CheckpointError(
                f"optimizer state {key} {tuple(tensor.shape)} does not fit this engine: "
                "resume with the model, zero_stage and number of workers that wrote it"
            )
        parameter = parameters[int(index)]
        if name == "master":
            parameter.data.copy_(tensor)
        else:
            state[parameter][name] = tensor.to(parameter.device, copy=True)  # not a view of the checkpoint's file


def _parameters(engine: Any) -> list[Tensor]:
    """What AdamW steps on: the model's parameters, or this rank's part of them in ZeRO's flat fp32 groups."""
    if engine.zero_optimization_stage() == 3:  # which lends them to the optimizer for the time of a step only
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
