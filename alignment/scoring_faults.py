"""What a failed scoring request means: whether a retry can cure it, what to do, whose fault it was."""

import re
from dataclasses import dataclass
from typing import Any

from alignment.errors import RewardError, RewardRequestError, RewardServerError


@dataclass(frozen=True, slots=True)
class Fault:
    """gRPC's name of a failure, e.g. UNAVAILABLE, and Triton's text, which may quote the conversation."""

    status: str
    text: str

    def __str__(self) -> str:
        return f"{self.status}: {self.text}"

    @property
    def is_curable(self) -> bool:
        """Faults that pass: overload, a lost connection, a model process that the server's keeper starts anew."""
        if self.status == "INVALID_ARGUMENT":  # its text may quote the conversation
            return False
        passes = self.status in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
        return passes or "Connection reset" in self.text or self._stub_is_gone

    @property
    def is_overload(self) -> bool:
        """The server is there and has too much to do."""
        return self.status == "DEADLINE_EXCEEDED" or "maximum queue size" in self.text

    def remedy(self, timeout_s: float) -> str:
        """What to do about a fault that retries, with `timeout_s` seconds each, did not cure."""
        if self._stub_is_gone:
            return "The model's process has died, and Triton never starts it again: restart the server"
        if self.status == "DEADLINE_EXCEEDED":
            return f"Raise reward.timeout_s ({timeout_s:g}), or give the server more threads or a GPU"
        return "Check that the server runs and is reachable"

    def refusal(self, who: str, offset: int, count: int) -> RewardError:
        """The error for an answer of `who` that no retry cures, to `count` conversations from index `offset` on.

        The model names the place within its request.
        """
        named = re.search(r"conversation (\d+): (.*)", self.text, re.DOTALL)
        if named:
            return RewardRequestError(f"{who} cannot score conversation {offset + int(named[1])}: {named[2].strip()}")
        if self.status == "INVALID_ARGUMENT":
            return RewardRequestError(f"{who} refused conversations {offset} to {offset + count - 1}: {self.text}")
        return RewardServerError(f"{who} failed with {self}")

    @property
    def _stub_is_gone(self) -> bool:
        return "not healthy" in self.text or "Stub process" in self.text


def fault(error: Any) -> Fault:
    """What tritonclient's InferenceServerException says."""
    status = str(error.status() or "UNKNOWN").removeprefix("StatusCode.")
    return Fault(status, " ".join(str(error.message() or error).split()))
