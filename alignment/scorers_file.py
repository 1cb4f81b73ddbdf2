"""scorers.json as others may have left it: references of the shape that this program writes, or an error."""

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from alignment.errors import DataError
from alignment.foreign_json import read_object
from alignment.run_folder import RunFolder
from alignment.types import JudgeRef, RewardModelRef

Reference = TypeVar("Reference", RewardModelRef, JudgeRef)


def read_scorers(run: RunFolder) -> dict[str, Any]:
    """What a run's scorers.json says, unchecked. Raises DataError where it is no JSON object."""
    return read_object(run.scorers, DataError, "put the run's own back, or start a new run")


def reward_references(run: RunFolder, found: Mapping[str, Any], key: str) -> list[RewardModelRef]:
    """The reward models under a key of scorers.json. Raises DataError, also for a name that is no folder's."""
    values = found.get(key)
    given = [reference(run, RewardModelRef, one, key) for one in (values if isinstance(values, list) else [values])]
    for one in given:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", one.name) or not re.fullmatch(r"[0-9]*", one.version):
            raise DataError(f"{run.scorers}: {key} is {one.name!r} version {one.version!r}, which names no export")
    return given


def reference(run: RunFolder, kind: type[Reference], value: Any, key: str) -> Reference:
    """A reference as scorers.json has it. Raises DataError for another shape."""
    try:
        # As JSON, of which a strict reading takes an object for a dataclass.
        made: Reference = TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first: Any = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, (key, *first["loc"])))
        raise DataError(f"{run.scorers}: {where}: {first['msg']}: it was not written by this program") from None
    return made


def checked_scorers(run: RunFolder) -> dict[str, Any]:
    """What scorers.json says, its references looked at. Raises DataError."""
    found = read_scorers(run)
    for key in ("reward_model", *(key for key in ("members", "shadows") if key in found)):
        reward_references(run, found, key)
    reference(run, JudgeRef, found.get("judge"), "judge")
    return found
