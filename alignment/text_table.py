"""Rows of text in columns, for the terminal: nothing but spaces between them, so that a pipe can cut them up."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, all of which have as many cells; columns are two spaces apart, lines end with a character.

    A cell keeps to its line: whatever cannot be printed becomes a space.
    """
    shown = [["".join(c if c.isprintable() else " " for c in cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*shown, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
