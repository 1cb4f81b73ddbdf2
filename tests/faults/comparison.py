"""Whether a run ended as one that nothing disturbed: same prompts, responses, decisions, validations and weights."""

from collections.abc import Iterator

from alignment.lineage import check
from alignment.run_folder import RunFolder
from faults.scene import STEPS
from models.checkpoints import checkpoint_folder, finished, read_manifest

DECISION = ("prompt_id", "rollout_index", "response", "selected", "reason")
"""The reason holds the reward as it was compared."""
TOLERANCE = 1e-5
"""Of validations: a server's batches move a score by some 1e-6."""


def differences(run: RunFolder, undisturbed: RunFolder) -> Iterator[str]:
    """What differs between a finished run and the undisturbed one, or is not whole; nothing where all is well.

    Raises AlignmentError where a file cannot be read.
    """
    for right, what in check(run):
        if not right:
            yield f"not whole: {what}"
    ours, theirs = ([r for r in x.read_metrics() if r["kind"] == "step"] for x in (run, undisturbed))
    if [(r["step"], r["prompt_ids"]) for r in ours] != [(r["step"], r["prompt_ids"]) for r in theirs]:
        yield f"other RS steps or prompts: {[r['step'] for r in ours]}"
    for step in range(1, STEPS + 1):
        rows, expected = (
            [tuple(row[k] for k in DECISION) for row in x.read_rollouts(step)] for x in (run, undisturbed)
        )
        if rows != expected:
            yield f"other responses or decisions in RS step {step}"
    yield from _validations(run, undisturbed)
    digests = [read_manifest(checkpoint_folder(x.checkpoints, STEPS))["weights_sha256"] for x in (run, undisturbed)]
    if digests[0] != digests[1]:
        yield f"other weights: {digests[0]}, not {digests[1]}"
    # One that was killed right before it pruned has one more.
    if lacking := {p.name for p in finished(undisturbed.checkpoints)} - {p.name for p in finished(run.checkpoints)}:
        yield f"lacks the checkpoints {sorted(lacking)}"
    if left := list(run.checkpoints.glob(".*")):
        yield f"left behind: {left}"


def _validations(run: RunFolder, undisturbed: RunFolder) -> Iterator[str]:
    kept = ("step", "reward_mean", "judge_mean")
    ours, theirs = (
        [tuple(r[k] for k in kept) for r in x.read_metrics() if r["kind"] == "validation"] for x in (run, undisturbed)
    )
    same = len(ours) == len(theirs) and all(
        abs(a - b) <= TOLERANCE
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    if not same:
        yield f"other validations: {ours}, not {theirs}"
