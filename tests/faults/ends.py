"""How a command ended, by its status and what it printed: done, killed, stopped with a message, or none of these."""

import re
from dataclasses import dataclass
from pathlib import Path

from alignment import errors

ERRORS = tuple(name for name, value in vars(errors).items() if isinstance(value, type))
MESSAGE = re.compile(rf"({'|'.join(ERRORS)}):")
TRACEBACK = "Traceback (most recent call last)"
REMEDY = re.compile(
    r"\b(resume\w*|remove|delete|restore|put .* back|bring .* back|free (some )?space|export (it|again)"
    r"|start (anew|again|a new run)|try again|wait|stop|check|mend|unset|set|keep|correct|begins anew)\b",
    re.IGNORECASE,
)
"""What a message with a remedy asks its reader to do."""


@dataclass(frozen=True)
class End:
    """`message` is what it said at last, "" where it is done or was killed by us."""

    is_done: bool
    message: str = ""
    lost: str = ""
    """Why this is no end that a run may have; "" otherwise."""


def end_of(status: int, log: Path, *, was_killed: bool) -> End:
    """The end of a command with this status, whose output is in `log`; `was_killed` where a fault was meant for it."""
    text = log.read_text(errors="replace")
    if status == 0:
        return End(True)
    if TRACEBACK in text and not was_killed:
        return End(False, lost=f"a traceback: {text[text.rindex(TRACEBACK) :][-800:]}")
    found = [match.start() for match in MESSAGE.finditer(text)]
    message = text[found[-1] :] if found else ""
    if was_killed:
        return End(False, message)
    if not message:
        return End(False, lost=f"no message (status {status}): {text[-800:]}")
    if not REMEDY.search(message):
        return End(False, message, lost=f"no remedy in: {message[:800]}")
    return End(False, message)
