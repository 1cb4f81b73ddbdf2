"""What the flow's steps call: plain artifacts in, plain artifacts out, so that any Metaflow client reads them.

Heavy imports stay behind these functions: a flow's `--help` and `show` load none of them.
"""

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.atomic_files import write_json
from alignment.config import Config
from alignment.errors import ConfigError, DataError
from alignment.run_folder import RunFolder
from alignment.scorers_file import checked_scorers
from alignment.task import claim_devices, timed_task
from alignment.types import Checkpoint, JudgeRef, RewardModelRef
from alignment.workspace import child, create, opened

if TYPE_CHECKING:
    from alignment.live_card import Show


def begin(config: Config, run_id: str, resumed_id: str | None = None) -> tuple[str, dict[str, int]]:
    """Lay out the run folder and split the prompts, or take over those of `resume.from` or `reuse.rollouts`.

    It says what disk the run will need.
    A run that failed here and is resumed (`resumed_id`) keeps its folder, so the first id names it for good.
    Returns the run's path and the sizes of the prompt sets.
    """
    from alignment.continuation import adopt, find_source, first_id
    from alignment.inputs import check_inputs
    from alignment.mix_in import prepare_mix_in
    from alignment.preparation import prepare
    from alignment.reuse import adopt_rollouts, find_reused
    from alignment.rollout_engine import check_engine
    from alignment.trained_policy import check_recomputing

    # Before `latest`, which they may name, points to the new run.
    source, drawn, root = find_source(config), find_reused(config), config.run.root
    path = create(config.run, root, first_id(root, run_id, resumed_id), config.model_dump_json(indent=2))
    with ExitStack() as stack:
        run = stack.enter_context(opened(config, path))
        with timed_task(run, "start"):
            check_engine(config)
            check_inputs(config)
            if drawn is not None:
                adopt_rollouts(config, stack.enter_context(opened(config, drawn, writes=False, checkpoints=False)), run)
            elif source is None:
                prepare(config, run.path, print)
            else:
                adopt(config, stack.enter_context(opened(config, source, writes=False, all_kept=True)), run)
            check_recomputing(config)
            prepare_mix_in(config, run.path, print)
        counts = _counts(config, run)
    return path, counts


def _counts(config: Config, run: RunFolder) -> dict[str, int]:
    """The sizes of the prompt sets. Raises ConfigError where they do not go with the config."""
    from alignment.disk import disk_needs
    from alignment.preparation import NAMES, load_prompt_sets

    sets = load_prompt_sets(run.path)
    if config.rollouts.references == "join" and all(prompt.reference is None for prompt in sets.train):
        raise ConfigError(
            f"rollouts.references (join): none of the {len(sets.train)} prompts of prompts.train "
            f'({config.prompts.train}) has a reference answer: give them a "reference", or set '
            "rollouts.references=ignore"
        )
    counts = {name: len(getattr(sets, name)) for name in NAMES}
    total = config.total_steps(counts["train"])
    config.training.check_schedule(total)
    print(disk_needs(config, run, total))
    return counts


def prepare_scorers(config: Config, run_path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The reward model, exported, and the judge, saved; returns references to both.

    A run has one of each: they are written to scorers.json and found there by whatever goes on with the run. What
    `reward_ensemble` names stands there too; it is looked for first, before anything is trained.
    """
    from alignment.ensemble_stage import check_distinct, find_others
    from alignment.judge_stage import prepare_judge
    from alignment.reward_stage import prepare_reward_model

    claim_devices(config)
    with opened(config, run_path) as run:
        if not run.scorers.exists():
            with timed_task(run, "reward_model"):
                others = find_others(config)
                reward = prepare_reward_model(config, print, run.path.name)
                check_distinct(reward, others)
                judge = prepare_judge(config, run.path / "judge", print)
            named = replace(judge, uri=run.uri_of(Path(judge.uri)))
            write_json(run.scorers, {"reward_model": asdict(reward), "judge": asdict(named), **others})
        scorers = checked_scorers(run)
    return scorers["reward_model"], scorers["judge"]


def train_reward_model(config: Config, run_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The reward model of a config, trained and exported unless its recipe has been; its reference and its card."""
    from alignment.reward_repository import card_of
    from alignment.reward_stage import prepare_reward_model

    claim_devices(config)
    ref = prepare_reward_model(config, print, run_id)
    return asdict(ref), card_of(ref)


def run_iteration(
    config: Config, run_path: str, reward: dict[str, Any], judge: dict[str, Any], show: "Show | None" = None
) -> tuple[dict[str, Any], bool]:
    """The next iteration of RS steps; returns a reference to its last checkpoint and whether steps are left.

    `show` takes how to draw the run's page, each time that it has changed.
    """
    from alignment import colocated, inner_run
    from alignment.preparation import total_steps

    if config.loop.executor == "disaggregated":
        checkpoint, steps_left = inner_run.iterate(config, run_path, show)
        return asdict(checkpoint), steps_left
    with opened(config, run_path) as run:
        own = colocated.iterate(config, run, RewardModelRef(**reward), _judge_in(run, judge), show)
        checkpoint = replace(own, uri=run.uri_of(Path(own.uri)))
        return asdict(checkpoint), run.rollback() is None and checkpoint.step < total_steps(config, run.path)


def _judge_in(run: RunFolder, judge: dict[str, Any]) -> JudgeRef:
    """The run's judge where this task finds it."""
    return JudgeRef(**{**judge, "uri": run.local(judge["uri"])})


def run_evaluation(
    config: Config, run_path: str, reward: dict[str, Any], judge: dict[str, Any], started: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate and report, register what the run leaves, and give it its alias where it is promoted.

    Returns the report and a reference to the evaluated checkpoint.
    """
    from alignment.evaluation_stage import evaluate
    from models.promotions import promote_once
    from models.registry import register_result

    with opened(config, run_path, all_kept=True) as run:
        report, checkpoint = evaluate(config, run, RewardModelRef(**reward), _judge_in(run, judge), started)
    entry = register_result(config, run_path, reward, checkpoint)
    alias = report["promotion"]["alias"]
    if alias is not None:
        print(promote_once(config.run.root, entry, alias, report["run_id"]))
    return report, asdict(checkpoint)


def page_of(run_path: str) -> str:
    """report.html of a finished run, whose folder may be under s3://. Raises DataError where there is none."""
    from alignment.s3 import is_s3
    from alignment.s3_objects import read_bytes

    path = f"{run_path}/report.html"
    if not is_s3(path):
        return Path(path).read_text()
    found = read_bytes(path)
    if found is None:
        raise DataError(f"{path} is not there: resume the run, which writes it at its end")
    return found[0].decode()


def begin_sft(config: Config, run_id: str, resumed_id: str | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Lay out the folder of a supervised fine-tuning and write its examples; its path and a summary of each set."""
    from alignment.sft_stage import begin as begin_run

    return begin_run(config, run_id, resumed_id, print)


def train_sft(config: Config, run_path: str, data: list[dict[str, Any]], started: float) -> dict[str, Any]:
    """Fine-tune from the last checkpoint to the end, write the model; returns the report."""
    from alignment.sft_stage import finish, kept_by_loss, train

    with opened(config, run_path, all_kept=True, keeps=kept_by_loss) as run:
        train(config, run, print)
        return finish(config, run, data, started)


def begin_evaluation(config: Config, run_id: str, resumed_id: str | None = None) -> tuple[str, dict[str, Any], str]:
    """Lay out a folder in <run.root>/evaluations, find both policies and write the prompts.

    Returns the folder's path, a reference to the policy that is evaluated, and the base's folder or hub name.
    """
    from alignment.continuation import first_id
    from alignment.evaluation_stage import find_policies, prepare_prompts
    from alignment.inputs import check_inputs
    from alignment.lm_harness import check_tasks

    check_tasks(config.evaluation.lm_eval_tasks)
    model, base = find_policies(config, print)
    # A folder of their own: `latest` goes on to mean the newest run that trained.
    root = child(config.run.root, "evaluations")
    path = create(config.run, root, first_id(root, run_id, resumed_id), config.model_dump_json(indent=2))
    with opened(config, path) as run, timed_task(run, "start"):
        check_inputs(config)
        prepare_prompts(config, run, model, base)
    return path, asdict(model.checkpoint), base.checkpoint.uri


def run_evaluation_of(
    config: Config,
    run_path: str,
    reward: dict[str, Any],
    judge: dict[str, Any],
    model: dict[str, Any],
    base: str,
    started: float,
) -> dict[str, Any]:
    """Evaluate a policy that `begin_evaluation` found, and report; returns the report."""
    from alignment.evaluation_stage import evaluate_against

    with opened(config, run_path) as run:
        scorers = RewardModelRef(**reward), _judge_in(run, judge)
        return evaluate_against(config, run, *scorers, Checkpoint(**model), base, started)
