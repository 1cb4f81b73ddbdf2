"""The table of an RS step's rollouts, rollouts/step-*.parquet: one row per rollout, with its reward and decision."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment.atomic_files import write_atomically
from alignment.errors import DataError
from alignment.types import Decision, ScoredRollout

COLUMNS = {
    "step": "int64",
    "prompt_id": "string",
    "prompt": "string",
    "rollout_index": "int64",
    "response": "string",
    "finish_reason": "string",
    "num_tokens": "int64",
    "response_ids": "list_of_int32",
    "log_prob": "float64",
    "reward": "float64",
    "reward_model": "string",
    "reward_model_version": "string",
    "selected": "bool_",
    "reason": "string",
}
"""Columns of rollouts/step-*.parquet and their Arrow types. `response_ids` are the policy's tokens: a text need not
come from just one sequence of them."""
MODEL_COLUMNS = ("member_rewards", "shadow_rewards")
"""Further columns, maps from "name/version" to a score, of runs in which several reward models score."""


def write_rows(path: Path, step: int, scored: Sequence[ScoredRollout], decisions: Sequence[Decision]) -> None:
    """Writes the table whole or not at all.

    Raises DataError where the decisions do not belong to the rollouts, one each and in order, or where a text cannot
    be stored as UTF-8; DiskError where the file cannot be written.
    """
    import pyarrow.parquet as parquet

    table = _table(step, scored, decisions)
    # Unchecked, a bit that is turned over in a stored score would be read as another score.
    write_atomically(path, lambda file: parquet.write_table(table, file, write_page_checksum=True))


def read_rows(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a file of rollouts, one dict per rollout in the order written. Raises DataError.

    `columns`, of COLUMNS, are those that are read; without them all are.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path, columns=columns and list(columns), page_checksum_verification=True)
        _check_columns(table, columns or tuple(COLUMNS))
        rows: list[dict[str, Any]] = table.to_pylist()
    # ValueError: also a text that is not UTF-8. MemoryError: a damaged page may ask for any size.
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"cannot read {path}: {reason}; put it back from a copy. Where no checkpoint has this step behind it, "
            "remove it and resume: the step is done again"
        ) from error
    return rows


def _check_columns(table: Any, columns: Sequence[str]) -> None:
    """Raise ValueError where one of these columns is missing, there twice, of another type, or has gaps."""
    for name in columns:
        kind = COLUMNS[name]
        found = [table.schema.field(i).type for i in table.schema.get_all_field_indices(name)]
        if found != [_arrow_type(kind)]:
            raise ValueError(f"its column {name} is {', '.join(map(str, found)) or 'missing'}, not {kind}")
        if name != "log_prob" and table[name].null_count:  # of an answer that the policy did not draw
            raise ValueError(f"its column {name} has rows without a value")


def _arrow_type(kind: str) -> Any:
    import pyarrow as pa

    return pa.list_(pa.int32()) if kind == "list_of_int32" else getattr(pa, kind)()


def _table(step: int, scored: Sequence[ScoredRollout], decisions: Sequence[Decision]) -> Any:
    import pyarrow as pa

    schema = pa.schema([(name, _arrow_type(kind)) for name, kind in COLUMNS.items()])
    for name in MODEL_COLUMNS:
        if any(getattr(r, name) for r in scored):
            schema = schema.append(pa.field(name, pa.map_(pa.string(), pa.float64())))
    if [(r.prompt_id, r.rollout_index) for r in scored] != [(d.prompt_id, d.rollout_index) for d in decisions]:
        raise DataError(
            f"RS step {step}: {len(decisions)} decisions do not match {len(scored)} rollouts: "
            "there must be one for each, in the same order"
        )
    rows = []
    for r, d in zip(scored, decisions, strict=True):
        row = {"step": step, "selected": d.selected, "reason": d.reason}
        rows.append(row | {name: getattr(r, name) for name in schema.names if name not in row})
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except UnicodeEncodeError as error:
        raise DataError(f"RS step {step}: a text cannot be stored as UTF-8 ({error}): correct the prompts") from error
