"""Runs side by side: state, what differs in their configs, gains, win rates, KL, length, promotion, time, curves.

    python -m alignment.compare RUN RUN… [--html FILE] [--root DIR]

RUN is a run's folder, its s3:// URI or its id under --root (`latest` too). The others are compared with the first one,
paired over the evaluation prompts, where all were evaluated on the same ones. A run that is not finished has
its steps, and for the rest a dash; so has what an older version did not write. --html leaves the same as one page with
the reward curves, without scripts or network.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from alignment.atomic_files import write_text
from alignment.continuation import find_run_named
from alignment.errors import AlignmentError, ConfigError
from alignment.run_files import files_of
from alignment.run_summary import RunSummary, summarize


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison, leave its page where one is asked for; 1 where a run cannot be read."""
    options = _options(arguments)
    from alignment.run_comparison import compare_runs, text  # numpy, which --help does without

    try:
        runs = [_find(name, options.root) for name in options.runs]
        twice = [run for i, run in enumerate(runs) if run in runs[:i]]
        if twice:
            raise ConfigError(f"RUN ({twice[0]}) is named twice: name different runs")
        comparison = compare_runs([_summary(run) for run in runs])
        print(text(comparison))
        if options.html:
            from alignment.compare_page import render

            write_text(Path(options.html), render(comparison))
            print(options.html)
    except AlignmentError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _find(name: str, root: str) -> str:
    found = find_run_named("RUN", name, root)
    assert found is not None  # a name was given
    return found


def _summary(run: str) -> RunSummary:
    with files_of(run) as folder:
        return summarize(run, folder)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m alignment.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the runs; the others are compared with the first")
    parser.add_argument("--html", metavar="FILE", help="leave a page here too")
    parser.add_argument("--root", default="runs", help="where runs are looked for by their ids (default: runs)")
    options = parser.parse_args(arguments)
    if len(options.runs) < 2:
        parser.error("name two runs at the least")
    return options


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends it without a word
    sys.exit(main())
