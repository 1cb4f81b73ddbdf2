"""Selection strategies side by side on one run's rollouts: each is trained from them, and one report compares all.

    python -m alignment.strategies RUN [--strategies 'top_per_prompt' 'top_k_overall top_k=16' 'random_per_prompt' …]
                                       [--control 'random_per_prompt'] [--set section.field=value …] [--jobs N]
                                       [--root DIR] [--out FOLDER]

RUN is a run's folder, its s3:// URI or its id under --root. A strategy is a name of `selection.strategy`, followed by
other fields of that section where they are to differ. Where it does not say how many to keep, it keeps as many as RUN
did: RUN's number per prompt, or that times the prompts of a step overall. Each is an ordinary run of RSFlow with
`reuse.rollouts=RUN` and otherwise RUN's config, so it has its own folder, report and dashboard; nothing is generated or
scored but validation and evaluation. Differences are to the control, the first random strategy unless --control names
another one, and paired over the evaluation prompts, which all have in common. RUN itself, which drew its own rollouts
in every step, stands beside them.

In --out, by default <run.root>/strategies/<RUN's id>: comparison.json, comparison.txt, and the run id of each strategy.
The same command again takes finished runs as they are, and resumes one that was interrupted.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.atomic_files import write_json, write_text
from alignment.config import Config, apply_overrides, parse_config, validate_config
from alignment.continuation import find_run_named
from alignment.errors import AlignmentError, ConfigError, WorkerError
from alignment.launch import SOURCE_ROOT
from alignment.lifeline import ELSEWHERE_S
from alignment.run_files import files_of
from alignment.s3 import is_s3
from alignment.s3_objects import read_bytes
from alignment.strategy_report import Measured, compare, measured, table
from alignment.workspace import child, local_root

DEFAULT = ("top_per_prompt", "top_k_overall", "random_per_prompt")


@dataclass(frozen=True, slots=True)
class Arm:
    """A strategy, as the command named it, and the config of its run."""

    name: str
    config: Config


def arms_of(theirs: Config, run: str, strategies: Sequence[str], overrides: Sequence[str] = ()) -> tuple[Arm, ...]:
    """The arms over the rollouts of `run`, whose config is `theirs`. Raises ConfigError."""
    twice = [name for i, name in enumerate(strategies) if name in strategies[:i]]
    if twice:
        raise ConfigError(f"--strategies names {twice[0]!r} twice: name each once")
    values = theirs.model_dump(mode="json")
    values["resume"]["from"] = None
    values["reuse"]["rollouts"] = run
    values = apply_overrides(values, overrides)
    return tuple(Arm(name, validate_config({**values, "selection": _selection(theirs, name)})) for name in strategies)


def control_of(arms: Sequence[Arm], name: str | None) -> str:
    """The name of the arm that all are compared with. Raises ConfigError where there is none."""
    random = [arm.name for arm in arms if arm.config.selection.strategy.startswith("random")]
    if name is None and not random:
        raise ConfigError("--strategies names no random strategy to compare with: add random_per_prompt, or --control")
    found = name or random[0]
    if found not in [arm.name for arm in arms]:
        raise ConfigError(f"--control ({found}) is none of --strategies: write it as it stands there")
    return found


def _selection(theirs: Config, text: str) -> dict[str, Any]:
    """The section that a strategy's words mean. Fields that it does not name are RUN's."""
    strategy, *words = text.split() or [""]
    rule, samples = theirs.selection, theirs.rollouts.num_rollout_samples
    overall = strategy.endswith("overall")
    each = rule.top_n_rollouts if rule.top_k is None else max(1, rule.top_k // samples)
    kept = {"top_n_rollouts": each, "top_k": (rule.top_k or each * samples) if overall else None}
    values = {"selection": {**rule.model_dump(mode="json"), "strategy": strategy, **kept}}
    found: dict[str, Any] = apply_overrides(values, [f"selection.{word}" for word in words])["selection"]
    return found


def run_arm(arm: Arm, out: Path) -> str:
    """The path or URI of the arm's finished run, which is begun, or resumed, where it is not finished.

    Raises WorkerError where it fails.
    """
    id_file = out / f"{slug(arm.name)}.run_id"
    begun = id_file.read_text().strip() if id_file.exists() else None
    known = begun is not None and _config_of(child(arm.config.run.root, begun)) == arm.config
    if begun and known and _is_there(f"{child(arm.config.run.root, begun)}/report.json"):
        print(f"{arm.name}: run {begun} is there", flush=True)
        return child(arm.config.run.root, begun)
    if begun and known:
        print(f"{arm.name}: resuming run {begun}", flush=True)
        words = ["resume", "--origin-run-id", begun]
    else:
        print(f"{arm.name}: begins", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        words = ["run", "--run-id-file", str(id_file), "--tag", f"strategy:{arm.name}"]
        words = ["--config-value", "config", arm.config.model_dump_json(), *words]
    if run_flow(words):
        raise WorkerError(f"{arm.name}: its run failed, the lines above say why; the same command goes on with it")
    return child(arm.config.run.root, id_file.read_text().strip())


def run_flow(words: Sequence[str]) -> int:
    """Exit status of RSFlow, which ends with this process."""
    flow = SOURCE_ROOT / "flows" / "rs_flow.py"
    process = subprocess.Popen(
        [sys.executable, str(flow), "--watch-stdin", f"{ELSEWHERE_S:g}", "--no-pylint", *words],
        stdin=subprocess.PIPE,  # never written to
    )
    return process.wait()


def slug(name: str) -> str:
    """A strategy's name as that of a file."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", name)


def _is_there(file: str) -> bool:
    return read_bytes(file) is not None if is_s3(file) else Path(file).is_file()


def _config_of(run: str) -> Config | None:
    with files_of(run) as folder:
        return parse_config(folder.config.read_text()) if folder.config.is_file() else None


def _measured(name: str, run: str) -> Measured:
    with files_of(run) as folder:
        return measured(name, run, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, print and leave the comparison; 1 where something is wrong."""
    options = _options(arguments)
    try:
        text = _compared(options)
    except AlignmentError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


def _compared(options: argparse.Namespace) -> str:
    run = str(find_run_named("RUN", options.run, options.root))
    theirs = _config_of(run)
    if theirs is None:
        raise ConfigError(f"RUN ({run}) has no config.json: name a run")
    arms = arms_of(theirs, run, options.strategies, options.overrides)
    control = control_of(arms, options.control)
    out = Path(options.out) if options.out else local_root(arms[0].config.run) / "strategies" / run.rpartition("/")[2]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda arm: run_arm(arm, out), arms))
    found = [_measured(arm.name, where) for arm, where in zip(arms, runs, strict=True)]
    if _is_there(f"{run}/report.json"):
        found.append(_measured("RUN itself, on its own rollouts", run))
    result = {"rollouts": run, **compare(found, control)}
    text = table(result)
    write_json(out / "comparison.json", result)
    write_text(out / "comparison.txt", text + "\n")
    return f"{text}\n{out / 'comparison.json'}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m alignment.strategies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="the run whose rollouts all strategies select from")
    parser.add_argument("--strategies", nargs="+", default=list(DEFAULT), help="each a name, then field=value …")
    parser.add_argument("--control", help="the one of them that all are compared with")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", help="section.field=value, for all strategies"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--root", default="runs", help="where RUN is looked for by its id")
    parser.add_argument("--out", help="folder of the comparison")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
