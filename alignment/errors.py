"""Every error that a user can cause or cure, in one tree.

AlignmentError
├── ConfigError        a key of the config: names the key, its value and the remedy
├── DataError          a file or a record: names the file and the line
├── ModelError         a model folder that is missing, unreadable or unfit
├── CheckpointError    a checkpoint that is missing, foreign or damaged
├── TrainingError      the policy's weights, loss or gradient are no longer finite
├── DiskError          no space, or a folder that cannot be written
├── StorageError       S3: not reachable, not allowed, not there, or not what it should be
│   └── StorageConflict       an object that was to be new or unchanged was written by somebody else
├── WorkerError        a worker process ended with an error
├── StoppedError       the run was asked to stop, or its time was over, and has a checkpoint
└── RewardError        scoring failed
    ├── RewardServerError     the server: not there, not ready, gone, overloaded
    └── RewardRequestError    the request: refused by the model, not curable by a retry

A message is one or two sentences for the person at the terminal. The flows print it without a traceback.
"""

LONGEST = 8000
"""Characters of a message: more of what it quotes is left out in the middle."""


class AlignmentError(Exception):
    """Root of the errors that are shown to users as a message without a traceback."""

    def __str__(self) -> str:
        """The message as a terminal may show it: what it quotes of a file neither steers the terminal nor fills it."""
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
        return printable(text)


def printable(text: str) -> str:
    """A text without what steers a terminal or cannot be printed, line ends apart: written as Python escapes it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class ConfigError(AlignmentError):
    """A config key has a bad value."""


class DataError(AlignmentError):
    """A data file or one of its records cannot be used."""


class ModelError(AlignmentError):
    """A model folder is missing, unreadable or unfit for its role."""


class CheckpointError(AlignmentError):
    """A checkpoint is missing, foreign or damaged."""


class TrainingError(AlignmentError):
    """The policy's weights, loss or gradient are no longer finite."""


class DiskError(AlignmentError):
    """A file could not be written."""


class StorageError(AlignmentError):
    """An object store (S3) cannot be reached, refuses, or does not hold what it should, after the retries."""


class StorageConflict(StorageError):
    """A conditional write lost: the object is there already, or is no longer the one that was read."""


class WorkerError(AlignmentError):
    """A worker process ended with an error; the message carries its last lines."""


class StoppedError(AlignmentError):
    """The run stopped in order, before its end, and can be resumed from its checkpoint."""


class RewardError(AlignmentError):
    """Scoring failed. A failed score is never turned into a number."""


class RewardServerError(RewardError):
    """The reward server is not there, not ready, gone or overloaded, after the retries."""


class RewardRequestError(RewardError):
    """The reward model refused a request; sending it again would not help."""
