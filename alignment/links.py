"""Links that lead out of a folder: whoever copies or sends such a folder would copy what was never meant."""

from pathlib import Path


def link_out(folder: Path) -> Path | None:
    """The first link below a folder that leads to no file or folder of it; None where there is none.

    Whoever may write into a shared folder could else have others publish a file that only they may read.
    """
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not _leads_into(path, root):
            return path
    return None


def _leads_into(link: Path, root: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # it leads nowhere, or in a circle
        return False
