"""What the measurements on a GPU share: sizes of the work, and the card that it runs on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.card import Card
from benchmarks.gpu_model import HALF_BILLION, TINY
from benchmarks.rounds import Note, Way, interleaved

DTYPE = "bfloat16"
MB = 1e6

Found = dict[str, Any]
"""A measurement's numbers by name, as they go into the file."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured. Rollouts: prompts, samples, tokens, rows of `generate`. Updates: sequences, tokens of each."""

    model: Mapping[str, int]
    copied: int
    side: int
    small: tuple[int, int, int, int]
    large: tuple[int, int, int, int]
    updates: tuple[tuple[int, int], ...]
    prompt_lengths: tuple[tuple[int, int], ...]
    """Shortest and longest prompt of each measurement of reading `large` many prompts."""


GPU = Sizes(
    model=HALF_BILLION,
    copied=2**30,
    side=8192,
    small=(16, 8, 64, 32),
    large=(64, 16, 256, 1024),
    updates=((8, 256), (32, 1024)),
    prompt_lengths=((40, 200), (400, 2000)),
)
CPU = Sizes(
    model=TINY,
    copied=2**20,
    side=64,
    small=(4, 2, 6, 4),
    large=(4, 4, 8, 16),
    updates=((3, 16), (8, 24)),
    prompt_lengths=((4, 20),),
)


@dataclass(frozen=True)
class Run:
    """What all measurements share."""

    folder: Path
    sizes: Sizes
    card: Card
    rounds: int
    note: Note

    @property
    def device(self) -> str:
        return self.card.device

    def model(self) -> Any:
        """The policy, to be sampled from."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=DTYPE).eval().to(self.device)

    def seconds(self, title: str, ways: Mapping[str, Way], tolerance: float) -> dict[str, list[float]]:
        """One number per round and way."""
        return interleaved(ways, self.rounds, self.note, title=title, clock=self.card.clock, tolerance=tolerance)
