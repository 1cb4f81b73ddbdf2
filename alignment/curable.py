"""Which errors end a task for good: those that a repetition, on another node, would only meet again.

What places a task and repeats it asks: `@srun`, `@if_curable`. An error that is none of this project's may be anything,
and is repeated.
"""

from alignment import errors

CURABLE = (errors.RewardServerError, errors.StorageError, errors.WorkerError)
"""What another try may cure."""


def comes_again(name: str) -> bool:
    """Whether an error of this name is one of this project that no repetition cures."""
    kind = getattr(errors, name, None)
    return isinstance(kind, type) and issubclass(kind, errors.AlignmentError) and not issubclass(kind, CURABLE)
