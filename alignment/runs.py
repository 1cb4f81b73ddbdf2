"""The runs of a folder, newest first: state, RS step, reward, checkpoint.

    python -m alignment.runs [--root DIR]

STATE is `running` with the task at work, `between tasks` while the next one starts, `interrupted` (`resume` goes on),
`failed` with the reason, `finished`, `promoted` or `not promoted`; `unfinished` where an older version left the run or
it lives under s3://, so that nobody here knows whether somebody works on it. STEP is what is done of `loop.max_steps`,
REWARD the mean of all rollouts of the last RS step, GAIN that of the evaluation over the base with its 95 % interval,
CHECKPOINT the one that was evaluated, before that the newest.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from alignment.errors import AlignmentError, ConfigError
from alignment.run_folder import RunFolder
from alignment.run_summary import RunSummary, interval, summarize
from alignment.terminal import Colour, coloured
from alignment.text_table import aligned

HEAD = ("RUN", "STATE", "STEP", "REWARD", "GAIN", "CHECKPOINT")
COLOURS: dict[str, Colour] = {
    "running": "blue",
    "between tasks": "blue",
    "interrupted": "yellow",
    "failed": "red",
    "unreadable": "red",
    "promoted": "green",
    "not promoted": "yellow",
}
"""By the state's word."""


def rows_of(root: Path) -> list[list[str]]:
    """The cells of each run in `root`, newest first. Raises ConfigError where there is no such folder.

    Ids are Metaflow's, which rise with time. What names a run a second time (`latest`, a resume's id) is no row.
    """
    if "://" in str(root) or not root.is_dir():
        raise ConfigError(
            f"--root ({root}) is no folder: it is made by the first run (`python flows/rs_flow.py run`); name another "
            "run.root, or give `python -m alignment.compare` runs under s3:// by their URI"
        )
    folders = [p for p in root.iterdir() if (p / "config.json").is_file() and not p.is_symlink()]
    return [_row(folder) for folder in sorted(folders, key=_age, reverse=True)]


def _age(folder: Path) -> tuple[int, str]:
    """Ids that are numbers by their value: those of a Metaflow service are short and rise."""
    return (int(folder.name), "") if folder.name.isdecimal() else (0, folder.name)


def _row(folder: Path) -> list[str]:
    try:
        run = summarize(str(folder), RunFolder(folder))
    except AlignmentError as error:  # the others are worth listing
        return [folder.name, f"unreadable: {error}", "", "", "", ""]
    reward = "" if run.reward is None else f"{run.reward:.3f}"
    return [run.name, str(run.state), run.step, reward, _gain(run), run.checkpoint or ""]


def _gain(run: RunSummary) -> str:
    gain, ends = run.evaluation.get("reward_gain"), interval(run.evaluation, "reward_gain")
    if gain is None or ends is None:
        return ""
    return f"{gain:+.3f} ({ends[0]:+.3f} to {ends[1]:+.3f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0, or 1 where there is no such folder."""
    parser = argparse.ArgumentParser(
        prog="python -m alignment.runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="runs", help="the run.root of the runs (default: runs)")
    options = parser.parse_args(arguments)
    try:
        rows = rows_of(Path(options.root))
    except AlignmentError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if not rows:
        print(f"no runs in {options.root}: `python flows/rs_flow.py run` begins one")
        return 0
    head, *lines = aligned([list(HEAD), *rows])
    print(head)
    for line, row in zip(lines, rows, strict=True):
        word = row[1].partition(":")[0]
        print(coloured(line, COLOURS.get(word), sys.stdout))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends it without a word
    sys.exit(main())
