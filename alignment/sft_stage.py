"""Supervised fine-tuning of a policy: its run folder, its workers, the model and the report that come of it.

    <run.root>/sft/<run id>/
      config.json  metrics.jsonl  checkpoints/step-*/     as every training has them (see alignment.fitting)
      examples/  excluded_examples.jsonl                  what was learned from (see alignment.sft_data)
      model/                                              the result, a Hugging Face folder with its tokenizer
      report.json                                         the numbers

`sft/latest` points to the newest run, so `--set policy.model=runs/sft/latest/model` aligns what it made.

    python -m alignment.sft_stage CHECKPOINT FOLDER       another checkpoint's model, adapters merged
"""

import argparse
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignment.atomic_files import disk_errors, settle_files, write_json
from alignment.config import Config, parse_config
from alignment.errors import AlignmentError, ConfigError, StoppedError
from alignment.progress import FitLines, duration
from alignment.run_folder import RunFolder
from alignment.run_mirror import Names
from alignment.sft_data import TRAINED, prepare_examples
from alignment.task import claim_devices, fit_on_workers, timed_task
from alignment.types import Checkpoint
from alignment.workspace import child, create, opened

WORKER = "alignment.sft_worker"
STEP_KEYS = ("step", "loss", "lr", "grad_norm", "examples", "tokens", "learned_tokens", "seconds", "tokens_per_second")
"""What report.json says of each optimizer step."""

Note = Callable[[str], None]


def begin(config: Config, run_id: str, resumed_id: str | None, on_note: Note) -> tuple[str, list[dict[str, Any]]]:
    """Lay out the run's folder and write the examples; the run's path and a summary of each set of examples.

    A run that failed here and is resumed (`resumed_id`) keeps its folder, so the first id names it for good.
    """
    from alignment.continuation import first_id

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it only tokenizes, maybe on a node without the GPUs
    root = child(config.run.root, "sft")
    path = create(config.run, root, first_id(root, run_id, resumed_id), config.model_dump_json(indent=2))
    with opened(config, path, keeps=kept_by_loss) as run, timed_task(run, "start"):
        summaries = prepare_examples(config, run.path)
    for summary in summaries:
        left_out = ", ".join(f"{count} {fault}" for fault, count in summary["left_out"].items())
        listed = f"; left out {left_out}, listed in {run.uri}/excluded_examples.jsonl" if left_out else ""
        on_note(
            f"{summary['source']}: {summary['examples']} examples {summary['role']}, {summary['tokens']} tokens, "
            f"of which the loss counts {summary['learned_tokens']}{listed}"
        )
    return path, summaries


def kept_by_loss(config: Config, run: RunFolder) -> Names:
    """The checkpoints that a fine-tuning keeps: the newest, and `sft.keep_best` by validation loss."""
    from alignment.fitting import validation_losses
    from models.checkpoints import kept_folders

    def kept(names: Sequence[str]) -> set[str]:
        rewards = {step: -loss for step, loss in validation_losses(run).items()}
        folders = [Path(name) for name in names]
        return {
            folder.name
            for folder in kept_folders(folders, keep_last=1, keep_best=config.sft.keep_best, validations=rewards)
        }

    return kept


def train(config: Config, run: RunFolder, on_note: Note) -> None:
    """Train on all workers, from the last checkpoint if there is one. Raises AlignmentError."""
    claim_devices(config)
    with timed_task(run, "train"):
        stopped = fit_on_workers(WORKER, config, run, FitLines(on_note, "sft", "sft"))
    if stopped:
        raise StoppedError(f"{stopped}. `python flows/sft_flow.py resume` goes on from there")


def finish(config: Config, run: RunFolder, summaries: list[dict[str, Any]], started: float) -> dict[str, Any]:
    """Write the best checkpoint's model and the report; returns the report. `started` is Unix time."""
    from alignment.fitting import validation_losses
    from models.checkpoints import best_checkpoint, finished

    losses = validation_losses(run)
    checkpoint = best_checkpoint(run.checkpoints, {step: -loss for step, loss in losses.items()})
    assert checkpoint is not None  # training has just ended
    with timed_task(run, "export"):
        write_model(config, checkpoint, run.path / "model")
    records = run.read_metrics()
    tasks = [record for record in records if record["kind"] == "task"]
    report = {
        "run_id": run.path.name,
        "steps": [{key: r[key] for key in STEP_KEYS} for r in records if r["kind"] == "step"],
        "validation": [{"step": step, "loss": loss} for step, loss in losses.items()],
        "data": summaries,
        "seconds": {"total": time.time() - started}
        | {name: sum(t["seconds"] for t in tasks if t["name"] == name) for name in ("start", "train", "export")},
        "checkpoints": [folder.name for folder in finished(run.checkpoints)],
        "model": {
            "uri": run.uri_of(run.path / "model"),
            "step": checkpoint.step,
            "validation_loss": losses.get(checkpoint.step),
        },
    }
    write_json(run.report_json, report)
    return report


def write_model(config: Config, checkpoint: Checkpoint, folder: Path) -> None:
    """A checkpoint's policy as a Hugging Face folder, adapters merged; it takes the place of what is there."""
    from alignment.fitting import read_weights
    from alignment.sft_worker import trainable_policy
    from models.adapters import load_trainable, merge_lora
    from models.quiet import quiet_transformers

    model, tokenizer = trainable_policy(config)
    load_trainable(model, read_weights(Path(checkpoint.uri)))
    if config.sft.lora_rank:
        model = merge_lora(model)
    staging = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    with disk_errors(folder), quiet_transformers():
        try:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            settle_files(staging)
            shutil.rmtree(folder, ignore_errors=True)
            staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def summary(report: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    steps, model = report["steps"], report["model"]
    learned = sum(s["learned_tokens"] for s in steps)
    sources = [f"{s['source']} ({s['examples']} examples)" for s in report["data"] if s["role"] == TRAINED]
    lines = [
        f"sft {report['run_id']}: {len(steps)} steps on {', '.join(sources)}",
        f"  loss       {steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f} nats per token, {learned} tokens learned",
    ]
    if report["validation"]:
        first, best = report["validation"][0], model["validation_loss"]
        lines.append(f"  validation {first['loss']:.3f} → {best:.3f}, the best after step {model['step']}")
    lines.append(f"  time       {duration(report['seconds']['total'])}")
    return "\n".join([*lines, f"  model      {model['uri']}: align it with --set policy.model={model['uri']}"])


def main() -> None:
    """The command line that writes another checkpoint's model."""
    parser = argparse.ArgumentParser(description="write the model of a checkpoint as a Hugging Face folder")
    parser.add_argument("checkpoint", help="a step-* folder of a run of flows/sft_flow.py")
    parser.add_argument("folder", help="where the model goes; it must not be there yet")
    options = parser.parse_args()
    from models.checkpoints import verify

    folder = Path(options.folder).absolute()
    try:
        if folder.exists():
            raise ConfigError(f"{folder} is there already: name a folder that is not, or move it away")
        checkpoint = verify(Path(options.checkpoint))
        config = parse_config((Path(checkpoint.uri) / "run_config.json").read_text())
        write_model(config, checkpoint, folder)
    except AlignmentError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
