"""Create the project's workspace and report in W&B, or write what they would be.

python -m infra.wandb --project rejection-sampling --entity TEAM
python -m infra.wandb --project rejection-sampling --entity TEAM --dry-run dashboard.json
"""

import argparse
import sys
from collections.abc import Sequence
from netrc import NetrcParseError
from pathlib import Path

from alignment.atomic_files import write_json
from alignment.errors import DiskError
from alignment.wandb_writer import has_credentials


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0, or 1 where W&B cannot be asked."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.wandb", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--project", required=True, help="W&B project: wandb.project of the runs")
    parser.add_argument("--entity", help="user or team that the project belongs to; by default that of the API key")
    parser.add_argument("--dry-run", type=Path, metavar="FILE", help="write both as JSON and ask no server")
    options = parser.parse_args(arguments)
    try:
        from infra.wandb import views
    except ImportError as error:
        return _failed(f"wandb-workspaces is missing ({error}): pip install -r requirements-wandb.txt")
    if options.dry_run:
        try:
            write_json(options.dry_run, views.specification(options.entity or "ENTITY", options.project))
        except DiskError as error:
            return _failed(str(error))
        print(f"{options.dry_run}: a workspace and a report of {options.project}")
        return 0
    try:
        if not has_credentials():
            return _failed("no API key is configured: set WANDB_API_KEY or run `wandb login`")
    except (NetrcParseError, OSError, ValueError) as error:  # its text may quote the key
        return _failed(f"the netrc file or WANDB_BASE_URL cannot be read ({type(error).__name__})")
    import wandb

    try:
        entity = options.entity or wandb.Api().default_entity
        for made in (views.workspace(entity, options.project), views.report(entity, options.project)):
            made.save()
            print(made.url)
    except Exception as error:  # of many types: no network, a refused key, no such entity
        return _failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return 0


def _failed(text: str) -> int:
    print(f"W&B: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
