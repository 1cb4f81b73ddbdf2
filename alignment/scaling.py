"""What a run would take on other numbers of GPUs: hours, GPU-hours, bytes, memory, and what holds it up.

    python -m alignment.scaling --model 8B --gpus 8 64 512 4096
    python -m alignment.scaling --model 70B --executor disaggregated --set costs.disaggregated_seconds=90 --json
    python -m alignment.scaling --from-run runs/latest --gpus 1 2 4 8

Costs are assumptions until they are measured: --costs FILE holds them in YAML or JSON, by the sections and fields of
alignment/scaling_types.py (model, hardware, costs, shape, plan), --set changes one, --from-run takes a run's model,
shape and measured rates. docs/scaling.md says what stands on what.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignment.errors import AlignmentError, ConfigError
from alignment.scaling_inputs import Inputs, case_of, from_run, overridden
from alignment.scaling_model import estimate
from alignment.scaling_types import MODELS, Costs, Estimate, Hardware, Shape

GPUS = tuple(2**k for k in range(3, 13))
EXECUTORS = ("colocated", "disaggregated")
HEADER = (
    *(
        "GPUs",
        "reward",
        "ZeRO × TP",
        "GB held",
        "rollouts s",
        "scoring s",
        "update s",
        "weights s",
        "saving, starting s",
    ),
    *("step s", "hours", "GPU-hours", "efficiency", "idle", "weights in, GB a step", "longest"),
)


def cells(made: Estimate) -> tuple[str, ...]:
    """A row of the table."""
    plan, held, parts = made.plan, made.memory, made.parts
    rollouts = sum(value for name, value in parts.items() if name.startswith("rollouts"))
    update = parts["update: arithmetic"] + parts["update: network"]
    trains = "" if plan.update_gpus == plan.gpus else f", {plan.update_gpus} train"
    return (
        f"{plan.gpus}{trains}",
        f"{plan.reward_gpus}",
        f"{held.zero_stage} × {plan.tensor_parallel}{', recompute' if held.recompute else ''}",
        _short((held.state + held.copy + held.activations) / 1e9),
        *map(_short, (rollouts, parts["scoring"], update, parts["weights"], parts["checkpoints"] + parts["starting"])),
        *map(_short, (made.step_seconds, made.wall_hours, made.gpu_hours)),
        f"{made.efficiency:.1%}",
        f"{made.idle_rollouts:.0%}, {made.idle_update:.0%}",
        _short(made.weight_bytes / 1e9),
        made.bottleneck,
    )


def told(inputs: Inputs, executor: str, rows: Sequence[Estimate | str]) -> str:
    """A table in Markdown under a line on the work and its data. A row may be a text: why there is no estimate."""
    made, shape = [row for row in rows if isinstance(row, Estimate)], inputs.shape
    lines = [
        f"{inputs.model.name}, {executor}: {shape.steps} RS steps of {shape.prompts} prompts × {shape.samples} "
        f"responses of {_short(shape.response_tokens)} tokens, {shape.max_new_tokens} at most"
    ]
    if made:
        lines[0] += (
            f"; written: rollouts {_short(made[0].rollout_bytes / 1e9)} GB, "
            f"checkpoints {_short(made[0].checkpoint_bytes / 1e9)} GB; "
            f"perfect: {_short(made[0].ideal_gpu_hours)} GPU-hours"
        )
        lines += ["", _row(HEADER), _row(["---"] * len(HEADER)), *(_row(cells(row)) for row in made)]
    starved = next((row for row in made if row.idle_rollouts >= 0.5), None)
    if starved:
        text = "half of the workers or more get no prompt: raise shape.prompts."
        lines += ["", f"From {starved.plan.gpus} GPUs on, {text}"]
    untrained = next((row for row in made if row.idle_update >= 0.5), None)
    if untrained:
        text = "half of the ranks' places or more train on nothing: raise shape.prompts and shape.global_batch_size."
        lines += ["", f"From {untrained.plan.update_gpus} GPUs that train on, {text}"]
    return "\n".join([*lines, *(f"\n{row}" for row in rows if isinstance(row, str))])


def plot(by_name: Mapping[str, Sequence[Estimate]], path: Path) -> list[Path]:
    """Wall time and efficiency by GPUs, an SVG each named after `path`, a line for each name."""
    from alignment.atomic_files import write_text
    from benchmarks.plot import line_chart

    hours = {name: [(row.plan.gpus, row.wall_hours) for row in rows] for name, rows in by_name.items()}
    shares = {name: [(row.plan.gpus, 100 * row.efficiency) for row in rows] for name, rows in by_name.items()}
    made = path.with_name(f"{path.stem}_hours.svg"), path.with_name(f"{path.stem}_efficiency.svg")
    write_text(made[0], line_chart("Wall time of the run", "GPUs", "hours", hours, logarithmic_y=True))
    write_text(made[1], line_chart("Efficiency beside perfect scaling", "GPUs", "per cent", shares))
    return list(made)


def estimates(inputs: Inputs, gpus: Sequence[int], executor: str, plan: Mapping[str, Any]) -> list[Estimate | str]:
    """One for each number of GPUs, or why there is none."""
    rows: list[Estimate | str] = []
    for number in gpus:
        try:
            rows.append(estimate(case_of(inputs, number, executor, plan)))
        except ConfigError as error:
            rows.append(str(error))
    return rows


def settings(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What --costs and --set say, by section. Raises ConfigError."""
    from alignment.config import read_mapping

    try:
        found = read_mapping(options.costs.read_text(encoding="utf-8"), str(options.costs)) if options.costs else {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--costs ({options.costs}): {error}") from error
    if not all(isinstance(part, dict) for part in found.values()):
        raise ConfigError(f"--costs ({options.costs}): write sections of fields, e.g. costs: {{update_share: 0.4}}")
    for text in options.set:
        name, separator, value = text.partition("=")
        section, dot, key = name.partition(".")
        if not separator or not dot:
            raise ConfigError(f"--set ({text}): write SECTION.FIELD=NUMBER")
        try:
            number = json.loads(value)
        except ValueError:
            raise ConfigError(f"--set ({text}): {value!r} is no number") from None
        found.setdefault(section, {})[key] = number
    return found


def main() -> int:
    """Print the tables; 1 where something was wrong, with a message."""
    options = _parser().parse_args()
    try:
        chosen = settings(options)
        plan = chosen.get("plan", {})
        inputs = [Inputs(MODELS[name], Hardware(), Costs(), Shape()) for name in options.model or MODELS]
        if options.from_run:
            known = {section: values for section, values in chosen.items() if section in ("hardware", "costs")}
            measured, own = from_run(options.from_run, overridden(inputs[0], known))
            inputs, plan = [measured], {**own, **plan}
        made = {
            (one.model.name, executor): (one, estimates(one, options.gpus, executor, plan))
            for one in (overridden(each, chosen) for each in inputs)
            for executor in options.executor
        }
    except AlignmentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([_plain(one, executor, rows) for (_, executor), (one, rows) in made.items()], indent=2))
    else:
        print("\n\n".join(told(one, executor, rows) for (_, executor), (one, rows) in made.items()))
    if options.plot:
        lines = {" ".join(name): [row for row in rows if isinstance(row, Estimate)] for name, (_, rows) in made.items()}
        for path in plot({name: rows for name, rows in lines.items() if rows}, options.plot):
            print(path, file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument("--model", nargs="+", choices=MODELS, help="policies; all without it")
    whose.add_argument("--from-run", type=Path, metavar="FOLDER", help="a run of this version, instead of a model")
    parser.add_argument("--gpus", nargs="+", type=_count, default=GPUS, help="that sample; colocated they train too")
    parser.add_argument("--executor", nargs="+", choices=EXECUTORS, default=EXECUTORS[:1])
    parser.add_argument("--costs", type=Path, metavar="FILE", help="YAML or JSON, by section and field")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=NUMBER")
    parser.add_argument("--json", action="store_true", help="everything, with what it was made from")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="charts, FILE_hours.svg and FILE_efficiency.svg")
    return parser


def _plain(inputs: Inputs, executor: str, rows: Sequence[Estimate | str]) -> dict[str, Any]:
    """What --json prints of one table."""
    derived = ("step_seconds", "efficiency", "bottleneck")
    shown = [
        {"error": row} if isinstance(row, str) else asdict(row) | {key: getattr(row, key) for key in derived}
        for row in rows
    ]
    return {"executor": executor, "inputs": asdict(inputs), "estimates": shown}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs")
    return int(text)


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _row(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


if __name__ == "__main__":
    sys.exit(main())
