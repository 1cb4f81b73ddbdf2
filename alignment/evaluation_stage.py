"""The `evaluate` step: the best checkpoint against the base, and the report."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.config import Config
from alignment.errors import CheckpointError
from alignment.preparation import cache_folder, load_prompt_sets
from alignment.progress import ProgressLines
from alignment.run_folder import RunFolder, write_json
from alignment.task import claim_devices, scoring_models, served, tested_clients, timed_task, tracker
from alignment.types import Checkpoint, JudgeRef, RewardModelRef

if TYPE_CHECKING:
    from alignment.evaluation import Samples
    from alignment.report import Sample

SETUP_TASKS = ("start", "reward_model")
"""Steps of the flow whose seconds are the report's `setup`."""


def evaluate(
    config: Config, run: RunFolder, reward: RewardModelRef, judge: JudgeRef, started: float
) -> tuple[dict[str, Any], Checkpoint]:
    """Evaluate the best checkpoint by validation, write evaluation.json and the report; returns report and checkpoint.

    `started` is the Unix time at which the run began.
    """
    from alignment.evaluation import evaluation, paired_rows
    from alignment.report import build_report, write_report
    from models.checkpoints import best_checkpoint

    claim_devices(config)
    checkpoint = best_checkpoint(run.checkpoints, run.validations())
    if checkpoint is None:
        raise CheckpointError(f"{run.checkpoints} holds no finished checkpoint: resume the run")
    begun = time.monotonic()
    with timed_task(run, "evaluate"):
        base, aligned, kl = _samples(config, run, reward, judge, checkpoint)
        result, rows = evaluation(base, aligned, kl), paired_rows(base, aligned, kl)
        write_json(run.path / "evaluation.json", rows)
    metrics = run.read_metrics()
    report = build_report(
        run_id=run.path.name,
        metrics=metrics,
        evaluation={**result, "seconds": time.monotonic() - begun},
        reward_model=reward,
        judge=judge,
        checkpoint=checkpoint,
        total_seconds=time.time() - started,
        setup_seconds=sum(r["seconds"] for r in metrics if r["kind"] == "task" and r["name"] in SETUP_TASKS),
        ensemble=_ensemble(config, run, reward),
    )
    write_report(run, report, [_sample(row) for row in rows])
    with tracker(config, run) as wandb_run:
        wandb_run.log_summary(report)
    return report, checkpoint


def _ensemble(config: Config, run: RunFolder, reward: RewardModelRef) -> dict[str, Any]:
    """What the report says of the other models that scored; nothing where the reward model did alone."""
    models, own = scoring_models(config, run, reward), config.reward_ensemble
    if len(models.all) == 1:
        return {}
    kinds = {"members": models.members, "shadows": models.shadows}
    keys = ("name", "version", "digest", "accuracy")
    refs = {kind: [{key: getattr(m, key) for key in keys} for m in found] for kind, found in kinds.items()}
    return {"combine": own.combine, "weights": dict(own.members), **refs}


def _samples(
    config: Config, run: RunFolder, reward: RewardModelRef, judge_ref: JudgeRef, checkpoint: Checkpoint
) -> tuple["Samples", "Samples", list[float]]:
    """Scored samples of base and aligned policy, and the aligned samples' KL to the base in nats."""
    import torch

    from alignment.embedded import policy_folder
    from alignment.evaluation import kl_to_base, sample_and_score
    from models.judge import load_judge
    from models.memory import keep_freed_memory
    from models.policy import load_policy

    torch.set_num_threads(config.resources.threads)
    keep_freed_memory()
    device = "cuda" if config.resources.gpu else "cpu"
    form = config.policy.prompt_format
    progress = ProgressLines(checkpoint.step)

    def reporter(phase: str) -> Callable[[int, int], None]:
        event = {"kind": "phase", "step": checkpoint.step, "phase": phase}
        return lambda done, total: progress.update({**event, "done": done, "total": total})

    with served(config, run, reward) as server:
        base = load_policy(policy_folder(config.policy.model, cache_folder(config)), prompt_format=form, device=device)
        aligned = load_policy(checkpoint.uri, prompt_format=form, device=device)
        prompts, judge = load_prompt_sets(run.path).evaluation, load_judge(Path(judge_ref.uri))
        with tested_clients(
            config, run, server, reward, lambda text: progress.update({"kind": "note", "text": text})
        ) as ensemble:
            of_base, of_aligned = (
                sample_and_score(
                    policy,
                    prompts,
                    ensemble,
                    judge,
                    samples_per_prompt=count,
                    max_new_tokens=config.rollouts.max_new_tokens,
                    batch_rows=config.rollouts.batch_rows,
                    stream=f"{config.seed}/evaluation/{who}",
                    on_progress=reporter(f"evaluating {who}"),
                )
                for who, policy, count in (("base", base, config.evaluation.best_of_n + 1), ("aligned", aligned, 1))
            )
    return of_base, of_aligned, kl_to_base(aligned, base, of_aligned.first())


def _sample(row: dict[str, Any]) -> "Sample":
    from alignment.report import Sample

    return Sample(
        prompt=row["prompt"],
        base=row["base_response"],
        aligned=row["aligned_response"],
        base_reward=row["base_reward"],
        aligned_reward=row["aligned_reward"],
        base_judge=row["base_judge"],
        aligned_judge=row["aligned_judge"],
    )
