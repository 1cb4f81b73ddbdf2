"""From an RS step's stored rollouts: histograms of all, and every response to a few prompts with its decision.

Bounded, whatever a run draws: 32 bins, and no more than ROWS responses of CHARACTERS characters.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignment.tracked_items import Histogram, Table

BINS = 32
ROWS = 256
"""Responses in a table; of one prompt they are all shown, however many."""
CHARACTERS = 2000
"""Of a text; a longer one ends in an ellipsis."""
COLUMNS = (
    *("step", "prompt_id", "prompt", "rollout_index", "response", "finish_reason", "num_tokens"),
    *("reward", "reward_model", "reward_model_version", "selected", "reason"),
)


def step_histograms(path: Path) -> dict[str, Histogram]:
    """Histograms of a rollouts file by their names; none where it is not there. Raises ArrowInvalid, OSError."""
    if not path.is_file():
        return {}
    import pyarrow.parquet as parquet

    columns = parquet.read_table(path, columns=["reward", "num_tokens", "selected"]).to_pydict()
    rewards, chosen = np.asarray(columns["reward"], dtype=np.float64), np.asarray(columns["selected"], dtype=bool)
    found = {
        "train_rollouts/rewards": rewards,
        "train_rollouts/selected_rewards_histogram": rewards[chosen],
        "train_rollouts/response_lengths": np.asarray(columns["num_tokens"], dtype=np.float64),
    }
    finite = {name: values[np.isfinite(values)] for name, values in found.items()}
    return {name: histogram(values) for name, values in finite.items() if len(values)}


def histogram(values: "np.ndarray[Any, np.dtype[np.float64]]") -> Histogram:
    """Of one value or more, all finite."""
    counts, edges = np.histogram(values, bins=BINS)
    return Histogram(tuple(counts.tolist()), tuple(edges.tolist()), float(values.sum()), float(np.square(values).sum()))


def samples_table(path: Path, prompts: int) -> Table | None:
    """All responses to the first `prompts` prompts of a rollouts file, or to fewer by ROWS; None without a file."""
    if not prompts or not path.is_file():
        return None
    import pyarrow.compute as compute
    import pyarrow.parquet as parquet

    ids = parquet.read_table(path, columns=["prompt_id"])["prompt_id"].to_pylist()
    shown = _shown(ids, prompts)
    table = parquet.read_table(path, columns=list(COLUMNS), filters=compute.field("prompt_id").isin(shown))
    return Table(COLUMNS, [[_cut(row[name]) for name in COLUMNS] for row in table.to_pylist()])


def _shown(ids: Sequence[str], prompts: int) -> list[str]:
    """The first prompts whose responses are together no more than ROWS, one at the least."""
    counts: dict[str, int] = {}
    for prompt_id in ids:
        counts[prompt_id] = counts.get(prompt_id, 0) + 1
    shown, rows = list[str](), 0
    for prompt_id, count in list(counts.items())[:prompts]:
        rows += count
        if shown and rows > ROWS:
            break
        shown.append(prompt_id)
    return shown


def _cut(value: Any) -> Any:
    return value[:CHARACTERS] + "…" if isinstance(value, str) and len(value) > CHARACTERS else value
