"""RSFlow of a time when the config had no sections for clusters: a resume finds what an old run has left."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "flows"))

import sources

NEWER = ("slurm", "kubernetes")
_parse = sources.parse_preset


def without_newer(values: dict) -> dict:
    """A config that lacks the newer sections."""
    return {name: value for name, value in values.items() if name not in NEWER}


def make_older(config: Path) -> None:
    """Take the newer sections out of a config.json."""
    config.write_text(json.dumps(without_newer(json.loads(config.read_text()))))


if __name__ == "__main__":
    sources.parse_preset = lambda text: without_newer(_parse(text))
    from rs_flow import RSFlow

    sources.main(RSFlow)
