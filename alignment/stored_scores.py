"""The scores of an RS step that was begun before: whoever does the step again uses them.

Rollouts are the same, bit for bit, when a step is done again, but a server that batches dynamically may differ in the
last bits of a score, and a decision must not.
"""

from typing import Any

from alignment.ensemble import Ensemble, by_model
from alignment.rollout_table import MODEL_COLUMNS
from alignment.run_folder import RunFolder
from alignment.types import Rollout, ScoredRollout, with_reward

Key = tuple[str, int, str]
StoredScores = dict[Key, dict[str, Any]]


def key(rollout: Rollout) -> Key:
    """What a stored score belongs to."""
    return rollout.prompt_id, rollout.rollout_index, rollout.response


def stored_scores(run: RunFolder, ensemble: Ensemble, step: int) -> StoredScores:
    """Scores of this very step from an attempt that did not reach its checkpoint, by the same reward models."""
    if not run.rollouts_file(step).exists():
        return {}
    return {
        (row["prompt_id"], row["rollout_index"], row["response"]): row
        for row in run.read_rollouts(step)
        if ensemble.knows(row)
    }


def known(ensemble: Ensemble, rollout: Rollout, stored: StoredScores) -> ScoredRollout:
    """The rollout with its stored score."""
    row = stored[key(rollout)]
    by_column = {column: by_model(row, column) for column in MODEL_COLUMNS}
    return with_reward(rollout, row["reward"], model=ensemble.model_name, version=ensemble.model_version, **by_column)
