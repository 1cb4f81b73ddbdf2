"""Does the method hold up? Rejection sampling, its random control, GRPO, RLOO and best-of-n at equal samples.

    python -m benchmarks.method [--set section.field=value …] [--seeds 0 1 2] [--jobs N] [--out FOLDER]
                                [--arm 'NAME: METHOD section.field=value …' …]

Every arm starts from the same base, reads the same prompts in the same order and samples the same number of
responses; all are measured on the same held-out prompts against the same responses of the base, by the reward
model, by the judge and by the exact KL. METHOD is rejection_sampling, grpo or rloo; the fields, of how it is trained,
change the preset for that arm alone. An arm that --out already holds under the same config is not run again. Members
of a combined reward are exports that are there; arms that select by it are measured by reward.name like the others:

    --arm 'vote: rejection_sampling reward_ensemble.combine=vote reward_ensemble.members={"reward_model":1,"other":1}'

Leaves method.json, method.md (the table) and method.svg (win rate by the judge against KL) in --out. GRPO and RLOO
need `pip install -r requirements-trl.txt`. On a GPU: --set resources.gpu=1.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.atomic_files import write_json, write_text
from alignment.config import Config, load_config
from alignment.errors import AlignmentError
from alignment.launch import worker_environment
from benchmarks.method_table import best_of, compared, table
from benchmarks.plot import line_chart

ROOT = Path(__file__).resolve().parent.parent
NUMBERS_OF_BEST = (2, 4, 8, 16)
ARMS = (
    "rejection sampling: rejection_sampling",
    "random control: rejection_sampling selection.strategy=random_per_prompt",
    "GRPO: grpo training.lr=2e-5 training.kl_penalty=0",
    "RLOO: rloo training.lr=2e-5 training.kl_penalty=0",
)
"""TRL's default rate, 1e-6, is meant for longer trainings than these: the peers get twenty times that."""


OWN_SECTIONS = ("rollouts", "selection", "training", "loop", "reward_ensemble")
"""Sections that an arm may change. All else, and the length of responses, is what the comparison holds fixed."""


@dataclass(frozen=True)
class Arm:
    """One way of training, under a config of its own."""

    name: str
    method: str
    config: Config

    def file(self, out: Path) -> Path:
        """Where its measurements go."""
        return out / f"{self.name.replace(' ', '-')}-seed-{self.config.seed}.json"


def main() -> int:
    """Run what is missing, print the table, leave table, plot and numbers in `--out`."""
    options = _options()
    out = Path(options.out)
    try:
        arms = _arms(options)
        bases = [Arm("base", "base", _config(options, seed, [])) for seed in options.seeds]
        weights = [_prepare(base.config, out / f"seed-{base.config.seed}") for base in bases]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda arm: _run(arm, out, weights[options.seeds.index(arm.config.seed)]), [*bases, *arms]))
    except AlignmentError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    measured = {arm.file(out): json.loads(arm.file(out).read_text())["points"] for arm in [*bases, *arms]}
    base = [measured[b.file(out)][0] for b in bases]
    rows = [best_of(n, base) for n in NUMBERS_OF_BEST]
    curves = {"best of n": [(0.0, 0.5), *((row.kl.value, row.judge_win_rate.value) for row in rows)]}
    for name in dict.fromkeys(arm.name for arm in arms):
        mine = [arm for arm in arms if arm.name == name]
        points = [measured[arm.file(out)] for arm in mine]
        course = [compared(name, [p[i] for p in points], base, mine[0].config) for i in range(len(points[0]))]
        rows.append(course[-1])
        curves[name] = [(0.0, 0.5), *((row.kl.value, row.judge_win_rate.value) for row in course)]
    text = table(rows)
    print(text)
    write_text(out / "method.md", text + "\n")
    title = "One response against one of the base"
    lowest = min(rate for points in curves.values() for _, rate in points)
    bottom = math.floor(lowest * 10) / 10
    chart = line_chart(title, "KL to the base, nats", "win rate by the judge", curves, logarithmic=False, bottom=bottom)
    write_text(out / "method.svg", chart)
    write_json(out / "method.json", [row.plain() for row in rows])
    return 0


def _arms(options: argparse.Namespace) -> list[Arm]:
    texts = options.arm or ARMS
    arms = [_arm(text, options, seed) for seed in options.seeds for text in texts]
    names = ["base", *(arm.name for arm in arms[: len(texts)])]  # each names a file
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        sys.exit(f"--arm: {twice!r} names two arms (`base` is one already): give each a name of its own")
    return arms


def _arm(text: str, options: argparse.Namespace, seed: int) -> Arm:
    name, _, rest = text.partition(":")
    method, *overrides = rest.split() or [""]
    if method not in ("rejection_sampling", "grpo", "rloo"):
        sys.exit(f"--arm {text!r}: expected 'NAME: rejection_sampling|grpo|rloo section.field=value …'")
    if not re.fullmatch(r"[\w .+-]+", name.strip()):
        sys.exit(f"--arm {text!r}: a name is letters, digits, spaces and . + - _, since it names a file")
    config, common = _config(options, seed, overrides), _config(options, seed, [])
    own = {name: getattr(config, name) for name in OWN_SECTIONS}
    own["rollouts"] = config.rollouts.model_copy(update={"max_new_tokens": common.rollouts.max_new_tokens})
    if config != common.model_copy(update=own):
        sys.exit(
            f"--arm {text!r}: an arm's own fields are those of {', '.join(OWN_SECTIONS)}, and all arms share "
            "rollouts.max_new_tokens: what measures them is the same for all, by --set"
        )
    if method != "rejection_sampling" and config.policy.prompt_format != "text":
        sys.exit(f"--arm {text!r}: the peers are compared on policy.prompt_format=text alone")
    if method != "rejection_sampling" and config.training.lr_schedule != "constant":
        sys.exit(f"--arm {text!r}: the peers are compared at training.lr_schedule=constant alone")
    if method != "rejection_sampling" and config.reward_ensemble.members:
        sys.exit(f"--arm {text!r}: the peers learn from one reward model: leave reward_ensemble.members empty")
    return Arm(name.strip(), method, config)


def _config(options: argparse.Namespace, seed: int, overrides: Sequence[str]) -> Config:
    return load_config(options.config, [*options.overrides, f"seed={seed}", *overrides])


def _prepare(config: Config, folder: Path) -> Path:
    """Prompts and judge in `folder`; returns the folder of the reward model's weights, which are trained once."""
    from alignment.judge_stage import prepare_judge
    from alignment.preparation import prepare
    from alignment.reward_stage import prepare_reward_model

    folder.mkdir(parents=True, exist_ok=True)
    prepare(config, folder, print)
    prepare_judge(config, folder / "judge", print)
    ref = prepare_reward_model(config, print, "benchmarks.method")
    return Path(ref.repository) / ref.name / ref.version / "weights"


def _run(arm: Arm, out: Path, weights: Path) -> None:
    """Run an arm in a process of its own, unless its file is there and of the same method and config."""
    file, config = arm.file(out), arm.config.model_dump(mode="json")
    what = {"method": arm.method, "config": config}
    if _is_there(file, what):
        return print(f"{file.stem}: there already")
    print(f"{file.stem}: begins", flush=True)
    own, points = file.with_suffix(".config.json"), file.with_suffix(".points.json")
    write_json(own, config)
    launcher = ["-m", "alignment.one_node", "--nproc-per-node=1"] if arm.method == "rejection_sampling" else []
    command = [sys.executable, *launcher, "-m", "benchmarks.method_arm", "--method", arm.method]
    command += ["--folder", str(out / f"seed-{arm.config.seed}"), "--config", str(own)]
    command += ["--reward-model", str(weights), "--out", str(points)]
    with open(file.with_suffix(".log"), "w", encoding="utf-8") as log:
        done = subprocess.run(command, cwd=ROOT, env=_one_gpu(), stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise AlignmentError(f"{arm.name} ended with status {done.returncode}: its log is {log.name}")
    write_json(file, {**what, "points": json.loads(points.read_text())})
    for scratch in (own, points):
        scratch.unlink()
    print(f"{file.stem}: done", flush=True)


def _is_there(file: Path, what: Mapping[str, Any]) -> bool:
    """Whether a file holds this arm's measurements, with the ids of their prompts, which were not always written."""
    found = json.loads(file.read_text()) if file.exists() else {}
    return what.items() <= found.items() and "prompts" in found["points"][0]


def _one_gpu() -> dict[str, str]:
    """An arm's environment, with one GPU: on all of them a peer would sample so many times the responses."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {**worker_environment(), "CUDA_VISIBLE_DEVICES": first}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "imdb_sentiment.yaml"), help="preset: a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", help="section.field=value, for all arms"
    )
    parser.add_argument("--arm", action="append", help="'NAME: METHOD section.field=value …' instead of the usual ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each arm is run once a seed")
    parser.add_argument("--jobs", type=int, default=1, help="arms that run at once")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "method"), help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
