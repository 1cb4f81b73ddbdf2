"""Colours, where somebody sees them: on a terminal that does not ask for none (https://no-color.org)."""

import os
from typing import Literal, TextIO

Colour = Literal["red", "green", "yellow", "blue"]
CODES: dict[Colour, int] = {"red": 31, "green": 32, "yellow": 33, "blue": 34}


def shows_colours(stream: TextIO) -> bool:
    """Whether what is written to `stream` may hold colours: not in a file or a pipe, nor under NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, colour: Colour | None, stream: TextIO) -> str:
    """`text` in a colour, if there is one and `stream` shows it."""
    return f"\x1b[{CODES[colour]}m{text}\x1b[0m" if colour and shows_colours(stream) else text
