"""Comparisons, each a command that prints its result; `make bench` runs those that end in a ratio."""
