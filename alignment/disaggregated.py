"""One RS step in phases that may run on different nodes: what the steps of RSIterationFlow call.

The same stage functions as the colocated worker's, cut at the same places: prompts → rollouts → scored →
decisions → checkpoint → validation. What passes between phases is plain JSON values; `place` says where
the step is: run_path, step, from_sha256 (of the checkpoint that it goes on from, "" for the base), and, once
they are there, reward_model_ref and judge_ref. Each phase works under the `resources` of its own (`Config.in_phase`).

Straggler rule: a shard that fails, is lost or exceeds its time is repeated `phases.rollouts.retries` times, by the same
random numbers. After that it is lost; up to `phases.max_lost_shards` of them the step goes on without their prompts,
which are never made up for, and names them in its record.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignment.atomic_files import write_json
from alignment.config import Config, parse_config
from alignment.errors import CheckpointError, ConfigError, WorkerError
from alignment.launch import Gang, run_workers
from alignment.node_gpus import take_gpu
from alignment.phase_parts import Plain, reused, rollout, sample, score, scored_rollout
from alignment.preparation import load_prompt_sets, total_steps
from alignment.rollback import settle
from alignment.rollouts import in_prompt_order
from alignment.run_folder import RunFolder
from alignment.scorers_file import checked_scorers
from alignment.stages import begin, prepare_scorers
from alignment.step_rules import decide, step_prompts, without_rollouts
from alignment.task import claim_devices
from alignment.triton_metrics import FIELDS
from alignment.types import Checkpoint, Prompt
from alignment.workspace import opened

Place = Mapping[str, Any]
Shard = tuple[Sequence[Mapping[str, Any]], float]
"""Rollouts of a shard, and the seconds that they took."""


def begin_step(config: Config, run_path: str | None, run_id: str, resumed_id: str | None = None) -> Plain:
    """Where the RS step after the last checkpoint of `run_path` is; without a path, step 1 of a new run.

    A new run that failed here and is resumed (`resumed_id`) keeps its folder. Raises ConfigError where there is no such
    run, or it has all its steps.
    """
    from models.checkpoints import newest_checkpoint

    path = run_path or begin(config, run_id, resumed_id)[0]
    with opened(config, path, writes=False) as run:
        if not run.config.is_file():
            raise ConfigError(f"--run_path ({path}): no run folder; give one that `run` made, or leave the option out")
        if parse_config(run.config.read_text()) != config:
            raise ConfigError(
                f"the run {path} was begun with another config: give its own, --config config {path}/config.json"
            )
        rollback = run.rollback()
        if rollback is not None:
            raise ConfigError(
                f"the run {path} does no further RS step: {rollback['reason']}. To go on from its best checkpoint, "
                f"begin another with --set resume.from={path} and another config"
            )
        checkpoint, total = newest_checkpoint(run.checkpoints), total_steps(config, run.path)
    done = checkpoint.step if checkpoint else 0
    if done >= total:
        raise ConfigError(
            f"the run {path} has all of its {total} RS steps: to go on, begin another with --set resume.from={path} "
            "and a larger loop.max_steps or loop.max_epochs"
        )
    return {"run_path": path, "step": done + 1, "from_sha256": checkpoint.sha256 if checkpoint else ""}


def lacks_nothing(config: Config, place: Place) -> bool:
    """Whether the run has its reward model and judge, and the validation of the policy that the step begins with."""
    with opened(config, place["run_path"], writes=False) as run:
        return run.scorers.exists() and not _validation_missing(config, run, place["step"])


def prepare_step(config: Config, place: Place) -> None:
    """Make what the step needs and the run lacks: reward model, judge, the validation of the policy it begins with."""
    prepare_scorers(config, place["run_path"])
    with opened(config, place["run_path"]) as run:
        _check_place(run, place)
        if _validation_missing(config, run, place["step"]):
            _validate(config.in_phase("validation"), run, _with_scorers(run, place), place["step"] - 1)


def with_scorers(config: Config, place: Place) -> Plain:
    """The place with references to the run's reward model and judge, which are there."""
    with opened(config, place["run_path"], writes=False) as run:
        return _with_scorers(run, place)


def _with_scorers(run: RunFolder, place: Place) -> Plain:
    scorers = checked_scorers(run)
    return {**place, "reward_model_ref": scorers["reward_model"], "judge_ref": scorers["judge"]}


def sample_shard(config: Config, place: Place, shard: int) -> tuple[list[Plain], float]:
    """Rollouts of a shard's prompts of the step by the last checkpoint's policy, and the seconds it took.

    No rollouts and no seconds where the step takes those of another run.
    """
    if config.reuse.rollouts:
        return [], 0.0
    config = config.in_phase("rollouts")
    begun = time.monotonic()
    with opened(config, place["run_path"], writes=False) as run:
        _check_place(run, place)
        if config.resources.gpu and not config.phases_elsewhere:
            take_gpu(run.path)
        prompts = _shards(config, run, place["step"])[shard]
        rollouts = sample(
            config,
            run,
            prompts,
            config.rollouts.num_rollouts_per_prompt,
            f"{config.seed}/step-{place['step']}",
            with_references=config.rollouts.references == "join",
        )
    seconds, tokens = time.monotonic() - begun, sum(r.num_tokens for r in rollouts)
    print(
        f"RS step {place['step']}, shard {shard + 1} of {config.phases.shards}: {len(rollouts)} rollouts of "
        f"{len(prompts)} prompts, {tokens} tokens, {seconds:.1f} s"
    )
    return [asdict(r) for r in rollouts], seconds


def score_shards(config: Config, place: Place, shards: Sequence[Shard | None]) -> Plain:
    """Rewards for the rollouts of all shards in the order of the step's prompts; None stands for a lost shard.

    Another run's rollouts, where the step takes those, have their scores. Returns `scored`, the phases' `seconds` so
    far, `scoring_server`'s statistics, what `scoring_cache` answered, and `lost_prompts`, by id. Raises WorkerError
    where more shards are lost than `phases.max_lost_shards` allows.
    """
    begun, step = time.monotonic(), place["step"]
    found = [shard for shard in shards if shard is not None]
    with opened(config, place["run_path"], writes=False) as run:
        _check_place(run, place)
        prompts = step_prompts(config, load_prompt_sets(run.path).train, step)
        if config.reuse.rollouts:
            scored = reused(config, run, prompts, step)
            seconds = {"rollouts": time.monotonic() - begun, "scoring": 0.0}
            server, cached, lost = dict.fromkeys(FIELDS), None, without_rollouts(prompts, scored)
        else:
            lost = _lost(config, run, step, shards)
            ordered = in_prompt_order([rollout(r) for rollouts, _ in found for r in rollouts], prompts)
            ref = place["reward_model_ref"]
            scored, server, cached = score(config.in_phase("scoring"), run, ref, ordered, step=step)
            seconds = {"rollouts": max(s for _, s in found), "scoring": time.monotonic() - begun}
    return {
        "scored": [asdict(r) for r in scored],
        "seconds": seconds,
        "scoring_server": server,
        "scoring_cache": cached,
        "lost_prompts": lost,
    }


def select_and_store(config: Config, place: Place, scored: Sequence[Mapping[str, Any]]) -> list[Plain]:
    """Decisions for the scored rollouts; both are written to the run's rollouts."""
    rollouts = [scored_rollout(r) for r in scored]
    decisions = decide(config, rollouts)
    with opened(config, place["run_path"]) as run:
        _check_place(run, place)
        run.write_rollouts(place["step"], rollouts, decisions)
    return [asdict(d) for d in decisions]


def train(
    config: Config, place: Place, scoring: Mapping[str, Any], decisions: Sequence[Mapping[str, Any]], gang: Gang
) -> Plain:
    """Fine-tune on the selected rollouts in workers of their own, on all nodes of the gang together.

    `scoring` is what `score_shards` returned. The first node returns a reference to the checkpoint, others nothing.
    """
    config = config.in_phase("update")
    claim_devices(config)
    with opened(config, place["run_path"], writes=gang.rank == 0) as run:
        checkpoint = _train(config, run, place, {**scoring, "decisions": decisions}, gang)
        return {**asdict(checkpoint), "uri": run.uri_of(Path(checkpoint.uri))} if checkpoint else {}


def _train(config: Config, run: RunFolder, place: Place, scored: Plain, gang: Gang) -> Checkpoint | None:
    from models.checkpoints import newest_checkpoint

    step = place["step"]
    _check_place(run, place, or_done=True)
    todo = run.path / "selected" / f"step-{step:06d}.json"
    if gang.rank == 0:  # workers of other nodes read it once the first node's have joined them
        write_json(todo, {**scored, "judge": run.local(place["judge_ref"]["uri"])})
    run_workers(
        "alignment.update_worker",
        ["--folder", str(run.path), "--step", str(step), "--scored", str(todo)],
        num_workers=config.num_workers,
        on_event=_say,
        check=lambda: None,
        gang=gang,
    )
    if gang.rank:
        return None
    checkpoint = newest_checkpoint(run.checkpoints)  # verified by whoever loads it
    if checkpoint is None or (checkpoint.step != step and run.rollback() is None):
        raise CheckpointError(f"{run.checkpoints} holds no checkpoint of RS step {step}, which the workers just made")
    todo.unlink(missing_ok=True)  # rollouts/ has it all, and for as long as the run is kept
    return checkpoint


def validate(config: Config, place: Place, checkpoint: Mapping[str, Any]) -> Plain:
    """The validation of the step's policy, where one is due; returns its means. The run gets the whole record.

    `checkpoint` is what `train` returned, and must still be the run's newest.
    """
    step = place["step"]
    with opened(config, place["run_path"]) as run:
        if run.rollback() is not None or not config.validates(step, total_steps(config, run.path)):
            return {}
        _check_place(run, place, trained=checkpoint["sha256"])
        recorded = [r for r in run.read_metrics() if r["kind"] == "validation" and r["step"] == step]
        # A repeated task finds its record.
        record = recorded[0] if recorded else _validate(config.in_phase("validation"), run, place, step)
        settle(config.promotion, run)
    return {key: value for key, value in record.items() if key not in ("rewards", "judged", "shadowed")}


def _validate(config: Config, run: RunFolder, place: Place, step: int) -> Plain:
    """Validate the last checkpoint's policy, or the base, and record it as that of RS step `step`."""
    from alignment.records import validation_record
    from models.judge import load_judge

    begun = time.monotonic()
    rollouts = sample(config, run, load_prompt_sets(run.path).validation, 1, f"{config.seed}/validation")
    scored, _, cached = score(config, run, place["reward_model_ref"], rollouts)
    judge = load_judge(Path(run.local(place["judge_ref"]["uri"])))
    seconds = time.monotonic() - begun
    record = validation_record(step, scored, judge, seconds, scoring_cache=cached)
    run.append_metrics(record)
    return record


def _validation_missing(config: Config, run: RunFolder, step: int) -> bool:
    done = step - 1
    return config.validates(done, total_steps(config, run.path)) and done not in run.validations()


def _shards(config: Config, run: RunFolder, step: int) -> list[Sequence[Prompt]]:
    """The step's prompts by shard: each takes every `phases.shards`-th."""
    prompts = step_prompts(config, load_prompt_sets(run.path).train, step)
    return [prompts[i :: config.phases.shards] for i in range(config.phases.shards)]


def _lost(config: Config, run: RunFolder, step: int, shards: Sequence[Shard | None]) -> list[str]:
    """Ids of the prompts that lost shards leave without rollouts. Raises WorkerError where too many are lost."""
    lost = [i for i, shard in enumerate(shards) if shard is None]
    names, allowed = ", ".join(str(i + 1) for i in lost), config.phases.max_lost_shards
    if len(lost) > allowed:
        raise WorkerError(
            f"RS step {step} lost the shards {names} of {len(shards)}, more than phases.max_lost_shards "
            f"({allowed}): their tasks say why. A resume samples all shards of the step anew"
        )
    prompts = [prompt.prompt_id for i in lost for prompt in _shards(config, run, step)[i]]
    if lost:
        print(f"RS step {step} goes on without the shards {names} and their {len(prompts)} prompts")
    return prompts


def _check_place(run: RunFolder, place: Place, *, or_done: bool = False, trained: str | None = None) -> None:
    """Raise CheckpointError where the run no longer stands where the step was begun: its phases must not mix.

    Or, once the step is trained, where its checkpoint of the digest `trained` is not the run's newest.
    """
    from models.checkpoints import newest_checkpoint

    newest, step = newest_checkpoint(run.checkpoints), place["step"]
    found = (newest.step, newest.sha256) if newest else (0, "")
    expected = (step, trained) if trained else (step - 1, place["from_sha256"])
    if found != expected and not (or_done and found[0] == step):
        raise CheckpointError(
            f"RS step {step} {'made' if trained else 'was begun from'} another checkpoint than the newest in "
            f"{place['run_path']}, that of RS step {found[0]}: it was removed, or something else has gone on with this "
            "run meanwhile. Begin the step anew"
        )


def _say(event: Mapping[str, Any]) -> None:
    if event["kind"] == "note":
        print(event["text"])
