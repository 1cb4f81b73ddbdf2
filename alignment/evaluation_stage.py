"""The `evaluate` step: a policy against a base, and the report. RSFlow evaluates its run's best checkpoint,
EvaluateFlow whatever `evaluation.model` names; both measure it here.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.config import Config
from alignment.lm_harness import check_tasks, run_tasks
from alignment.policy_source import PolicySource, base_folder, find_policy, loadable
from alignment.preparation import load_prompts, prepare_evaluation
from alignment.progress import PhaseLines
from alignment.promotion import gate
from alignment.report_lineage import lineage_of
from alignment.report_parts import devices_of
from alignment.rollback import standing_checkpoint
from alignment.run_folder import RunFolder, write_json
from alignment.s3 import is_s3
from alignment.task import claim_devices, scoring_models, served, tested_clients, timed_task, tracker
from alignment.types import Checkpoint, JudgeRef, RewardModelRef

if TYPE_CHECKING:
    from alignment.evaluation import Samples

SETUP_TASKS = ("start", "reward_model")
"""Steps of the flow whose seconds are the report's `setup`."""


def evaluate(
    config: Config, run: RunFolder, reward: RewardModelRef, judge: JudgeRef, started: float
) -> tuple[dict[str, Any], Checkpoint]:
    """Evaluate the best checkpoint by validation, write evaluation.json and the report; returns report and checkpoint.

    `started` is the Unix time at which the run began. A report that is there already is not made again: a resume must
    not change what has been said of a policy.
    """
    checkpoint = standing_checkpoint(run)
    named = replace(checkpoint, uri=run.uri_of(Path(checkpoint.uri)))
    base = config.policy.model if is_s3(run.uri) else str(base_folder(config))
    told = _told(run, named)
    if told is not None:
        _log(config, run, told)
        return told, named
    gated = partial(gate, config.promotion, step=checkpoint.step, rollback=run.rollback())
    found = partial(lineage_of, run, checkpoint.step)
    return evaluate_against(config, run, reward, judge, named, base, started, gated, found), named


def _told(run: RunFolder, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The report that says of this checkpoint whether it is promoted; None where there is none yet."""
    if not run.report_json.is_file():
        return None
    report: dict[str, Any] = json.loads(run.report_json.read_text())
    same = report["checkpoint"] == asdict(checkpoint) and "promotion" in report
    return report if same else None


def find_policies(config: Config, on_note: Callable[[str], None]) -> tuple[PolicySource, PolicySource]:
    """What `evaluation.model` and `evaluation.base` name, verified. Raises AlignmentError."""
    root, own = config.run.root, config.evaluation
    model = find_policy(own.model, root=root, key="evaluation.model", on_note=on_note, storage=config.run)
    name, key = (own.base, "evaluation.base") if own.base else (config.policy.model, "policy.model")
    base = find_policy(name, root=root, key=key, on_note=on_note, storage=config.run)
    on_note(f"evaluating {model.checkpoint.uri} against {base.checkpoint.uri}")
    return model, base


def prepare_prompts(config: Config, run: RunFolder, model: PolicySource, base: PolicySource) -> None:
    """Write the evaluation's prompts, without those that either policy's run trained or was chosen on."""
    seen = [
        prompt
        for source in (model, base)
        if source.run is not None
        for name in ("train", "validation", "mix_in")
        if (source.run / "prompts" / f"{name}.jsonl").is_file()
        for prompt in load_prompts(source.run, name)
    ]
    if model.run is None:
        print(f"what {model.checkpoint.uri} learned from is not known here: it may have seen the evaluation's prompts")
    prepare_evaluation(config, run.path, [model.folder, base.folder], seen, print)


def evaluate_against(
    config: Config,
    run: RunFolder,
    reward: RewardModelRef,
    judge: JudgeRef,
    checkpoint: Checkpoint,
    base: str,
    started: float,
    gated: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    traced: Callable[[], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Measure `checkpoint` against `base`, a folder, URI or name; write evaluation.json and the report, returned.

    `gated` makes the report's `promotion` from the rows of evaluation.json, `traced` its `lineage`.
    """
    from alignment.evaluation import evaluation, paired_rows
    from alignment.report import build_report, sample, write_report

    claim_devices(config)
    check_tasks(config.evaluation.lm_eval_tasks)
    begun = time.monotonic()
    with timed_task(run, "evaluate"):
        of_base, of_aligned, kl, tasks = _measure(config, run, reward, judge, checkpoint, base)
        result, rows = evaluation(of_base, of_aligned, kl), paired_rows(of_base, of_aligned, kl)
        write_json(run.path / "evaluation.json", rows)
    metrics = run.read_metrics()
    report = build_report(
        run_id=run.path.name,
        metrics=metrics,
        evaluation={**result, **tasks, "seconds": time.monotonic() - begun},
        reward_model=reward,
        judge=judge,
        base=base,
        checkpoint=checkpoint,
        total_seconds=time.time() - started,
        setup_seconds=sum(r["seconds"] for r in metrics if r["kind"] == "task" and r["name"] in SETUP_TASKS),
        ensemble=_ensemble(config, run, reward),
        promotion=gated(json.loads((run.path / "evaluation.json").read_text())) if gated else None,
        devices=devices_of(config),
        lineage=traced() if traced else None,
    )
    write_report(run, report, [sample(row) for row in rows])
    _log(config, run, report)
    return report


def _log(config: Config, run: RunFolder, report: dict[str, Any]) -> None:
    alias = report.get("promotion", {}).get("alias")
    with tracker(config, run) as wandb_run:
        wandb_run.log_models({report["checkpoint"]["step"]: ("best", *([alias] if alias else []))})
        wandb_run.log_summary(report)


def _ensemble(config: Config, run: RunFolder, reward: RewardModelRef) -> dict[str, Any]:
    """What the report says of the other models that scored; nothing where the reward model did alone."""
    models, own = scoring_models(config, run, reward), config.reward_ensemble
    if len(models.all) == 1:
        return {}
    kinds = {"members": models.members, "shadows": models.shadows}
    keys = ("name", "version", "digest", "accuracy")
    refs = {kind: [{key: getattr(m, key) for key in keys} for m in found] for kind, found in kinds.items()}
    return {"combine": own.combine, "weights": dict(own.members), **refs}


def _measure(
    config: Config, run: RunFolder, reward: RewardModelRef, judge_ref: JudgeRef, checkpoint: Checkpoint, base_uri: str
) -> tuple["Samples", "Samples", list[float] | None, dict[str, Any]]:
    """Scored samples of base and aligned policy, the aligned samples' KL to the base in nats, and what else is said:
    what `reuse.scores` answered, and harness tasks."""
    import torch

    from alignment.evaluation import kl_to_base, same_tokens, sample_and_score
    from models.judge import load_judge
    from models.memory import keep_freed_memory
    from models.policy import load_policy

    torch.set_num_threads(config.resources.threads)
    keep_freed_memory()
    device, own, policy = "cuda" if config.resources.gpu else "cpu", config.evaluation, config.policy
    prompts = load_prompts(run.path, "evaluation")
    progress = PhaseLines(len(prompts) * (own.best_of_n + 3))  # base, aligned, KL
    with served(config, run, reward) as server:
        base, aligned = (
            load_policy(
                loadable(uri, run, config.run, key),
                prompt_format=policy.prompt_format,
                device=device,
                dtype=policy.dtype,
            )
            for key, uri in (("evaluation.base", base_uri), ("evaluation.model", checkpoint.uri))
        )
        judge = load_judge(Path(judge_ref.uri))
        with tested_clients(config, run, server, reward, progress.note) as ensemble:
            of_base, of_aligned = (
                sample_and_score(
                    policy,
                    prompts,
                    ensemble,
                    judge,
                    samples_per_prompt=count,
                    max_new_tokens=config.rollouts.max_new_tokens,
                    batch_tokens=config.rollouts.batch_tokens,
                    stream=f"{config.seed}/evaluation/{who}",
                    on_progress=progress.phase(f"evaluating {who}"),
                )
                for who, policy, count in (("base", base, own.best_of_n + 1), ("aligned", aligned, 1))
            )
            counts = ensemble.take_counts()
    kl = None
    if same_tokens(aligned, base):
        kl = kl_to_base(aligned, base, of_aligned.first(), progress.phase("measuring KL"))
    else:
        progress.note("the two have different tokenizers: there is no KL from one to the other")
    cached = {} if counts is None else {"scoring_cache": counts}
    return of_base, of_aligned, kl, {**cached, **_tasks(config, {"base": base, "aligned": aligned}, progress)}


def _tasks(config: Config, policies: dict[str, Any], progress: PhaseLines) -> dict[str, Any]:
    """`lm_eval` of the report's evaluation: task to metric to the value of each policy; nothing without tasks."""
    own = config.evaluation
    if not own.lm_eval_tasks:
        return {}
    results = {}
    for who, policy in policies.items():
        progress.note(f"lm-evaluation-harness: {', '.join(own.lm_eval_tasks)} for {who}")
        results[who] = run_tasks(
            policy,
            own.lm_eval_tasks,
            limit=own.lm_eval_limit,
            batch_rows=config.training.micro_batch_size,
            seed=config.seed,
        )
    return {
        "lm_eval": {
            task: {metric: {who: results[who][task][metric] for who in policies} for metric in metrics}
            for task, metrics in results["base"].items()
        }
    }
