"""One RS step in phases that may run on different nodes: what the steps of RSIterationFlow call.

The same stage functions as the colocated worker's, cut at the same places: prompts → rollouts → scored →
decisions → checkpoint → validation. What passes between phases is plain JSON values; `place` says where
the step is: run_path, step, reward_model_ref, judge_ref.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignment.atomic_files import write_json
from alignment.config import Config, parse_config
from alignment.errors import CheckpointError, ConfigError
from alignment.launch import run_workers
from alignment.preparation import cache_folder, load_prompt_sets
from alignment.run_folder import RunFolder
from alignment.stages import begin
from alignment.task import claim_devices, served, tested_clients
from alignment.types import Decision, Prompt, RewardModelRef, Rollout, ScoredRollout, StepUpdate

Plain = dict[str, Any]
Place = Mapping[str, Any]


def begin_step(config: Config, run_path: str | None, run_id: str) -> Plain:
    """Where the RS step after the last checkpoint of `run_path` is; without a path, step 1 of a new run.

    Raises ConfigError where there is no such run, or it has all its steps.
    """
    from models.checkpoints import last_checkpoint

    path = run_path or begin(config, run_id)[0]
    if not RunFolder(Path(path)).config.is_file():
        raise ConfigError(f"--run_path ({path}): no run folder; give one that `run` made, or leave the option out")
    if parse_config(RunFolder(Path(path)).config.read_text()) != config:
        raise ConfigError(
            f"the run {path} was begun with another config: give its own, --config config {path}/config.json"
        )
    checkpoint = last_checkpoint(RunFolder(Path(path)).checkpoints)
    done = checkpoint.step if checkpoint else 0
    total = config.total_steps(len(load_prompt_sets(Path(path)).train))
    if done >= total:
        raise ConfigError(
            f"the run {path} has all of its {total} RS steps: to go on, begin another with --set resume.from={path} "
            "and a larger loop.max_steps or loop.max_epochs"
        )
    return {"run_path": path, "step": done + 1}


def sample_shard(config: Config, place: Place, shard: int, num_shards: int) -> tuple[list[Plain], float]:
    """Rollouts of every `num_shards`-th prompt of the step by the last checkpoint's policy, and the seconds it took."""
    from alignment.rs_step import step_prompts

    begun = time.monotonic()
    prompts = step_prompts(config, load_prompt_sets(_run(place).path).train, place["step"])[shard::num_shards]
    rollouts = _generate(
        config,
        place,
        prompts,
        config.rollouts.num_rollouts_per_prompt,
        f"{config.seed}/step-{place['step']}",
        with_references=config.rollouts.references == "join",
    )
    return [asdict(r) for r in rollouts], time.monotonic() - begun


def score_shards(
    config: Config, place: Place, shards: Sequence[tuple[Sequence[Mapping[str, Any]], float]]
) -> tuple[list[Plain], dict[str, float]]:
    """Rewards for the rollouts of all shards in the order of the step's prompts, and the phases' seconds so far."""
    from alignment.rollouts import in_prompt_order
    from alignment.rs_step import step_prompts

    begun = time.monotonic()
    prompts = step_prompts(config, load_prompt_sets(_run(place).path).train, place["step"])
    ordered = in_prompt_order([_rollout(r) for rollouts, _ in shards for r in rollouts], prompts)
    scored = [asdict(r) for r in _score(config, place, ordered, compare=True)]
    return scored, {"rollouts": max(s for _, s in shards), "scoring": time.monotonic() - begun}


def select_and_store(config: Config, place: Place, scored: Sequence[Mapping[str, Any]]) -> list[Plain]:
    """Decisions for the scored rollouts; both are written to the run's rollouts."""
    from alignment.rs_step import decide

    rollouts = [_scored(r) for r in scored]
    decisions = decide(config, rollouts)
    _run(place).write_rollouts(place["step"], rollouts, decisions)
    return [asdict(d) for d in decisions]


def train(
    config: Config,
    place: Place,
    scored: Sequence[Mapping[str, Any]],
    decisions: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
) -> Plain:
    """Fine-tune on the selected rollouts in workers of their own; returns a reference to their checkpoint."""
    from alignment.records import step_record
    from alignment.triton_metrics import FIELDS
    from models.checkpoints import last_checkpoint
    from models.judge import load_judge

    claim_devices(config)
    run, step, begun = _run(place), place["step"], time.monotonic()
    selection = run.path / "selected" / f"step-{step:06d}.json"
    write_json(selection, [r for r, d in zip(scored, decisions, strict=True) if d["selected"]])
    events: list[Plain] = []
    run_workers(
        "alignment.update_worker",
        ["--folder", str(run.path), "--step", str(step), "--selected", str(selection)],
        num_workers=config.num_workers,
        on_event=events.append,
        check=lambda: None,
    )
    checkpoint = last_checkpoint(run.checkpoints)
    if checkpoint is None or checkpoint.step != step:
        raise CheckpointError(f"{run.checkpoints} holds no checkpoint of RS step {step}, which the workers just made")
    result = StepUpdate(**next(e["update"] for e in events if e["kind"] == "update"))
    took = {**seconds, "update": time.monotonic() - begun}
    record = step_record(
        step,
        [_scored(r) for r in scored],
        [Decision(**d) for d in decisions],
        result,
        took,
        judge=load_judge(Path(place["judge_ref"]["uri"])),
        scoring_server=dict.fromkeys(FIELDS),  # of the scoring phase, whose server may be gone by now
    )
    run.truncate_metrics(step - 1)
    run.append_metrics(record)
    return asdict(checkpoint)


def validate(config: Config, place: Place) -> Plain:
    """The validation of the last checkpoint, where one is due; returns its means. The run gets the whole record."""
    from alignment.over_optimisation import newest_alarms
    from alignment.records import validation_record
    from models.judge import load_judge

    begun, run = time.monotonic(), _run(place)
    if not config.validates(place["step"], config.total_steps(len(load_prompt_sets(run.path).train))):
        return {}
    rollouts = _generate(config, place, load_prompt_sets(run.path).validation, 1, f"{config.seed}/validation")
    judge = load_judge(Path(place["judge_ref"]["uri"]))
    record = validation_record(place["step"], _score(config, place, rollouts), judge, seconds=time.monotonic() - begun)
    if not any(r["kind"] == "validation" and r["step"] == place["step"] for r in run.read_metrics()):
        run.append_metrics(record)  # a retried task finds its record
    for alarm in newest_alarms(run.read_metrics()):
        print(f"alarm: {alarm.text}")
    return {key: value for key, value in record.items() if key not in ("rewards", "judged", "shadowed")}


def _generate(
    config: Config,
    place: Place,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    stream: str,
    *,
    with_references: bool = False,
) -> list[Rollout]:
    """Rollouts by the policy of the last checkpoint, or of the base, in the order of `prompts`."""
    import torch

    from alignment.embedded import policy_folder
    from alignment.rollout_engine import load_engine
    from alignment.rollouts import generate, in_prompt_order
    from alignment.rs_step import training_sampling
    from models.checkpoints import last_checkpoint
    from models.policy import load_policy

    torch.set_num_threads(config.resources.threads)
    checkpoint = last_checkpoint(_run(place).checkpoints)
    source = checkpoint.uri if checkpoint else policy_folder(config.policy.model, cache_folder(config))
    policy = load_policy(
        source,
        prompt_format=config.policy.prompt_format,
        device="cuda" if config.resources.gpu else "cpu",
        dtype=config.policy.dtype,
    )
    batches = generate(
        policy,
        prompts,
        samples_per_prompt=samples_per_prompt,
        sampling=training_sampling(config),
        batch_tokens=config.rollouts.batch_tokens,
        stream=stream,
        with_references=with_references,
        engine=load_engine(config, source),
    )
    return in_prompt_order([r for batch in batches for r in batch], prompts)


def _score(config: Config, place: Place, rollouts: Sequence[Rollout], *, compare: bool = False) -> list[ScoredRollout]:
    """The rollouts with rewards, from a server that lives as long as this call; `compare` those of each prompt."""
    reward = RewardModelRef(**place["reward_model_ref"])
    with (
        served(config, _run(place), reward) as server,
        tested_clients(config, _run(place), server, reward, print) as ensemble,
    ):
        scored = ensemble.score(rollouts)
        return ensemble.compared(scored) if compare else scored


def _run(place: Place) -> RunFolder:
    return RunFolder(Path(place["run_path"]))


def _rollout(values: Mapping[str, Any]) -> Rollout:
    return Rollout(**_with_tuples(values))


def _scored(values: Mapping[str, Any]) -> ScoredRollout:
    return ScoredRollout(**_with_tuples(values))


def _with_tuples(values: Mapping[str, Any]) -> Plain:
    """JSON has lists where the carriers have tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
