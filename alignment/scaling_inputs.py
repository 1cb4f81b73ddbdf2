"""Where the simulator's cases come from: presets, a file, single settings, or a run that was measured."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from alignment.errors import ConfigError, DataError
from alignment.run_folder import RunFolder
from alignment.scaling_memory import gpus_per_copy
from alignment.scaling_model import expected_slowest, update_network, update_slots
from alignment.scaling_types import Case, Costs, Hardware, Model, Plan, Shape
from models.tensor_shapes import tensor_shapes

PLAN = {"update_gpus", "reward_gpus", "tensor_parallel"}
"""What of a plan can be set; the rest is --gpus and --executor."""
Settings = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Inputs:
    """A case without its plan."""

    model: Model
    hardware: Hardware
    costs: Costs
    shape: Shape


def overridden(inputs: Inputs, settings: Settings) -> Inputs:
    """The inputs with the fields of `settings` by section, `plan` left out. Raises ConfigError."""
    parts = {name: _changed(name, getattr(inputs, name), settings.get(name, {})) for name in asdict(inputs)}
    unknown = set(settings) - {*parts, "plan"}
    if unknown:
        raise ConfigError(f"{min(unknown)}: no such section; there are {', '.join(parts)} and plan")
    changed = Inputs(**parts)
    shape = changed.shape
    if shape.response_tokens > shape.max_new_tokens:
        raise ConfigError(
            f"shape.response_tokens ({shape.response_tokens:g}) must be "
            f"<= shape.max_new_tokens ({shape.max_new_tokens})"
        )
    if shape.kept > shape.samples:
        raise ConfigError(f"shape.kept ({shape.kept}) must be <= shape.samples ({shape.samples})")
    return changed


def _changed(section: str, carrier: Any, values: Mapping[str, Any]) -> Any:
    """A carrier with other values, each a positive number of the field's kind. Raises ConfigError."""
    kinds = {field.name: field.type for field in fields(carrier)}
    for key, value in values.items():
        if key not in kinds or key == "name":
            raise ConfigError(f"{section}.{key}: no such field; there are {', '.join(kinds)}")
        whole, least = kinds[key] is int, "of 0 or more" if _may_be_zero(key) else "above 0"
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (value == 0 and not _may_be_zero(key)):
            raise ConfigError(f"{section}.{key} ({value!r}) must be a {'whole ' if whole else ''}number {least}")
        if key.endswith("_share") and value > 1:
            raise ConfigError(f"{section}.{key} ({value}) must be <= 1: it is a share of the hardware's peak")
    return replace(carrier, **values)


def _may_be_zero(key: str) -> bool:
    return key.endswith("_seconds") or key in ("straggling", "failures_per_gpu_hour")


def case_of(inputs: Inputs, gpus: int, executor: str, plan: Mapping[str, Any]) -> Case:
    """The case for so many GPUs; what `plan` does not say is chosen. Raises ConfigError.

    A GPU of reward server for four of the policy; the disaggregated update takes as many GPUs as get a whole
    micro-batch each, and each GPU that samples is a shard, as its config allows no other.
    """
    shape, hardware, colocated = inputs.shape, inputs.hardware, executor == "colocated"
    wanted = shape.global_batch_size // shape.micro_batch_size
    tensor_parallel = plan.get("tensor_parallel", gpus_per_copy(inputs.model, hardware) if colocated else 1)
    made = Plan(
        gpus=gpus,
        update_gpus=gpus if colocated else min(gpus, max(hardware.node, wanted)),
        reward_gpus=max(1, gpus // 4),
        tensor_parallel=tensor_parallel,
        colocated=colocated,
    )
    if set(plan) - PLAN:
        raise ConfigError(f"plan.{min(set(plan) - PLAN)}: cannot be set; there are {', '.join(sorted(PLAN))}")
    made = _changed("plan", made, plan)
    if gpus % tensor_parallel or tensor_parallel > hardware.node:
        raise ConfigError(
            f"plan.tensor_parallel ({tensor_parallel}) must divide --gpus ({gpus}) "
            f"and be <= hardware.node ({hardware.node})"
        )
    if colocated and made.update_gpus != gpus:
        raise ConfigError(f"plan.update_gpus ({made.update_gpus}): colocated workers all train; leave it out")
    if not colocated and tensor_parallel > 1:
        raise ConfigError(
            f"plan.tensor_parallel ({tensor_parallel}): a shard of the disaggregated executor samples on one GPU; "
            "leave it out, or take --executor colocated"
        )
    if not colocated and gpus > shape.prompts:
        raise ConfigError(
            f"--gpus ({gpus}): each is a shard of the disaggregated executor, which refuses more of them than a step "
            f"has prompts: shape.prompts ({shape.prompts})"
        )
    return Case(inputs.model, hardware, inputs.costs, shape, made)


def from_run(folder: Path, inputs: Inputs) -> tuple[Inputs, dict[str, int]]:
    """The model, shape and measured rates of a run, its first RS step left out where there are more; the plan's part.

    `inputs` have the hardware and costs that the run is taken apart by. Prompts count with their bound,
    max_prompt_tokens, in the shape and in the rates alike. What is measured of the scoring is the wait for it.
    Raises ConfigError, DataError.
    """
    from alignment.config import parse_config
    from alignment.preparation import load_prompts

    run = RunFolder(folder)
    records, config = run.read_metrics(), parse_config(_read(run.config))
    steps = [r for r in records if r["kind"] == "step"]
    if not steps:
        raise DataError(f"--from-run ({folder}): holds no finished RS step in {run.metrics.name}: name another run")
    measured, own = steps[1:] or steps, config.rollouts
    prompts = 0 if config.loop.max_epochs is None else len(load_prompts(run.path, "train"))
    shape = replace(
        inputs.shape,
        prompts=own.num_rollout_samples,
        samples=own.num_rollouts_per_prompt,
        kept=max(1, round(_mean(measured, "num_selected") / own.num_rollout_samples)),
        prompt_tokens=config.prompts.max_prompt_tokens,
        response_tokens=_mean(measured, "response_length_mean"),
        max_new_tokens=own.max_new_tokens,
        steps=config.total_steps(prompts),
        save_interval=config.loop.save_interval,
        steps_per_iteration=config.loop.steps_per_iteration,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
    )
    seconds = {phase: sum(r["seconds"][phase] for r in measured) / len(measured) for phase in measured[0]["seconds"]}
    found, gpus = replace(inputs, model=model_of(run), shape=shape), config.slurm.nodes * config.num_workers
    plan, trained = {"tensor_parallel": own.vllm_tensor_parallel}, {}
    if config.loop.executor == "disaggregated":
        gpus = config.phases.shards
        trained = {"update_gpus": config.phases.update_nodes * config.in_phase("update").num_workers}
    case = case_of(found, gpus, config.loop.executor, {**plan, **trained})
    costs = replace(measured_costs(case, seconds), worker_seconds=_starting(config.loop.executor, records, inputs))
    return replace(found, costs=costs), plan


def measured_costs(case: Case, seconds: Mapping[str, float]) -> Costs:
    """Rates by which the case's phases take `seconds`: of workers alone, so waits and collectives are taken off.

    Raises ConfigError where the case's hardware has collectives that take longer than the whole update.
    """
    shape, plan, spread, network = case.shape, case.plan, case.costs.straggling, update_network(case)
    steps, each = update_slots(case)
    if network >= seconds["update"]:
        raise ConfigError(
            f"the run's updates took {seconds['update']:.3g} s and the collectives alone would take {network:.3g} s: "
            "set hardware.nvlink, hardware.network and costs.network_share as they are where it ran"
        )
    sampled = case.prompts_each * shape.samples * shape.response_tokens / seconds["rollouts"]
    trained = steps * each * shape.sequence / (seconds["update"] - network)
    return replace(
        case.costs,
        rollout_tokens_per_s=sampled * expected_slowest(min(case.workers, shape.prompts), spread),
        update_tokens_per_s=trained * expected_slowest(plan.update_gpus, spread),
        scoring_tokens_per_s=shape.rollouts * shape.sequence / seconds["scoring"],
    )


def _starting(executor: str, records: Sequence[Mapping[str, Any]], inputs: Inputs) -> float:
    """Seconds until workers were ready; what is assumed where none were started by the task that has the record."""
    found = [r["starting"] for r in records if r["kind"] == "task" and "starting" in r]
    return sum(found) / len(found) if found and executor == "colocated" else inputs.costs.worker_seconds


def model_of(run: RunFolder) -> Model:
    """The shape of the policy in a run's newest checkpoint. Raises DataError."""
    folders = sorted(path.parent for path in run.checkpoints.glob("step-*/DONE"))
    if not folders:
        raise DataError(f"--from-run ({run.path}): holds no checkpoint, so its policy's size is unknown")
    shape, parameters = _json(folders[-1] / "config.json"), sum(map(math.prod, tensor_shapes(folders[-1])))
    try:
        heads, hidden = shape["num_attention_heads"], shape["hidden_size"]
        return Model(
            "the run's policy",
            parameters=parameters,
            layers=shape["num_hidden_layers"],
            hidden=hidden,
            key_heads=shape.get("num_key_value_heads") or heads,
            head_size=shape.get("head_dim") or hidden // heads,
            reward_parameters=parameters,
        )
    except KeyError as error:
        raise DataError(
            f"{folders[-1] / 'config.json'} lacks {error}: give the run's rates by --costs instead, "
            "and its size by --set model.FIELD=NUMBER"
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"cannot read {path}: {error}; name a run of this version") from error


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; name a run of this version") from error


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(record[key] for record in records)) / len(records)
