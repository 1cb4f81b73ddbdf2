"""What is decoded side by side, and how much of it fits."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from alignment.errors import ConfigError
from models.batching import TokenIds


@dataclass(frozen=True, slots=True)
class Job:
    """One response to be drawn: `sample` numbers those of a prompt."""

    prompt: int
    sample: int


class Rows(Protocol):
    """Responses that are decoded side by side, by their keys and values. Legend: B live rows, V vocabulary."""

    def begin(self, waiting: "deque[Job]") -> tuple[list[Job], list[Tensor]]:
        """Take up jobs from the left as far as there is room, after the live rows.

        Returns them and parts that together are the logits of their first tokens, (jobs, V).
        """

    def drop(self, ended: Sequence[int]) -> list[int]:
        """Let go of rows. Returns which of the old rows each of the rest is now."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row. Shape: tokens (B,); returns the logits of the next ones, (B, V)."""


@dataclass(frozen=True, slots=True)
class Room:
    """`rows` responses of at most `tokens` tokens beside `prompts` prompts of at most `width`, each stored once."""

    rows: int
    tokens: int
    prompts: int
    width: int

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values there is room for."""
        return self.rows * self.tokens + self.prompts * self.width


def most_room(lengths: Sequence[int], samples: int, tokens: int, *, budget: int, shared: bool) -> Room:
    """The most rows within `budget` cached tokens. Raises ConfigError where not one fits.

    With `shared` prompts there is room for twice those that fill the rows, since a prompt has ever fewer rows as its
    responses end; else each row has its prompt to itself.
    """
    width = max(lengths)

    def of(rows: int) -> Room:
        slots = min(len(lengths), rows, -(-2 * rows // samples)) if shared else rows
        return Room(rows, tokens, slots, width)

    most = len(lengths) * samples
    rows = next((rows for rows in range(most, 0, -1) if of(rows).cached_tokens <= budget), 0)
    if not rows:
        raise ConfigError(
            f"rollouts.batch_tokens ({budget}) must be >= {width + tokens}, the tokens of the longest prompt and of "
            "one response: raise it"
        )
    return of(rows)


def longest_first(prompts: Sequence[TokenIds], samples: int) -> "deque[Job]":
    """Jobs in the order in which they are begun: similar lengths together, the most memory at the start."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    return deque(Job(i, k) for i in order for k in range(samples))
