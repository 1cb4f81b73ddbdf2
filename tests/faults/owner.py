"""A run's command without Metaflow: `python -m faults.owner RUN OVERRIDE…`, the smoke preset with these overrides.

It does what the flow does up to its evaluation, and keeps what Metaflow would keep as artifacts in RUN.artifacts.json
of its working folder. Started again it goes on, as `resume` does. Errors are printed as the flow's tasks print them.
"""

import json
import sys
from pathlib import Path

from alignment.atomic_files import write_json
from alignment.config import load_config
from alignment.errors import AlignmentError
from flow_runs import SMOKE


def main() -> None:
    """Begin the run, or go on with it, to its last RS step."""
    from alignment.stages import begin, prepare_scorers, run_iteration

    _be_impatient_with_s3()
    name, overrides = sys.argv[1], sys.argv[2:]
    kept = Path(f"{name}.artifacts.json").absolute()
    try:
        config = load_config(SMOKE, overrides)
        if not kept.exists():
            path, _ = begin(config, name)
            write_json(kept, [path, *prepare_scorers(config, path)])
        path, reward, judge = json.loads(kept.read_text())
        while run_iteration(config, path, reward, judge)[1]:
            pass
    except AlignmentError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _be_impatient_with_s3() -> None:
    """As many tries as in a run, but short pauses between them and short time-outs: a fault costs a second."""
    from botocore import retryhandler

    from alignment import s3_connection

    retryhandler.delay_exponential = lambda base, growth_factor, attempts: 0.05
    s3_connection.STREAM_PAUSE_S, s3_connection.READ_TIMEOUT_S = 0.05, 2


if __name__ == "__main__":
    main()
