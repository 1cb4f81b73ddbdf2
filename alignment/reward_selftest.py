"""The self-test of a reward server before anything is scored for keeps: it serves the model that the run means, and
a score depends on nothing but its conversation.

What can be seen over the wire is tested there: the version that answers, one finite reward for each conversation,
and the same rewards alone, in one batch, and in another order. What can be seen on disk alone is tested for a server
of our own: the weights' digest, and that they hold every weight of the model. A head that transformers would draw at
random where the folder lacks it gives scores like any other, so of an external server neither can be known, and the
note says so.
"""

from collections.abc import Sequence
from pathlib import Path

from alignment.config_sections import RunSection
from alignment.errors import ModelError, RewardRequestError, RewardServerError
from alignment.reward_repository import local_repository
from alignment.scoring import RewardClient
from alignment.types import Message, RewardModelRef

TOLERANCE = 1e-4
"""Rewards further apart than this could change a selection, which compares them rounded to 4 decimals; of rewards
beyond 1 in size, the same share is allowed."""
PROBES: tuple[list[Message], ...] = tuple(
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    for answer in ("No", "I liked it.", "It was long, and I would not see it again", "Yes!", "Both of them, twice")
)
"""Conversations of different lengths, short enough for any reward model."""


def self_test(client: RewardClient, version: str) -> str:
    """Score PROBES alone, together and reordered; returns what was found.

    Raises RewardServerError where another version answers, a probe is refused or gets no finite reward, or the
    rewards disagree.
    """
    who = f"the reward model {client.model_name} version {client.model_version} at {client.url}"
    if client.model_version != version:
        raise RewardServerError(
            f"{who} answers in the place of version {version}, which this run scores with: serve that one, or unset "
            "reward.url"
        )
    try:
        alone = [client.score([probe])[0] for probe in PROBES]
        orders = {"in one batch": client.score(PROBES), "in reverse order": client.score(PROBES[::-1])[::-1]}
    except RewardRequestError as error:
        raise RewardServerError(
            f"{who} failed its self-test, plain conversations of a few words ({error}): check reward.max_tokens, or "
            "export the model again"
        ) from error
    for how, rewards in orders.items():
        _check_agreement(alone, rewards, f"{who} failed its self-test", how)
    gap = max(abs(a - b) for rewards in orders.values() for a, b in zip(alone, rewards, strict=True))
    return f"alone, batched and reordered agree within {gap:.0e}"


def check_export(reward: RewardModelRef, storage: RunSection | None = None) -> str:
    """Compare the export that a local server serves with the run's reference; returns what was found.

    `storage` says where copies of what lies in S3 are kept.
    Raises RewardServerError where its digest is another, its weights were changed, or some are missing.
    """
    from models.reward_export import read_version

    who = f"the reward model {reward.name} version {reward.version} of the local server, in {reward.repository},"
    try:
        versions = [(reward.name, reward.version)]
        with local_repository(reward.repository, versions, storage or RunSection()) as repository:
            found = read_version(repository, reward.name, reward.version)
            new = newly_made(repository / reward.name / reward.version / "weights")
    except ModelError as error:
        raise RewardServerError(f"{who} is not fit to score: {error}") from error
    if reward.digest and found.digest != reward.digest:
        raise RewardServerError(
            f"{who} has the digest {found.digest}, and this run scores with {reward.digest}: put that version back, "
            "or start a new run"
        )
    if new:
        raise RewardServerError(
            f"{who} lacks the weights {', '.join(new)}, and random numbers would stand there: export it again"
        )
    if not reward.digest:  # the run was begun with an external server, whose weights nobody saw
        return f"its weights are whole (sha256 {found.digest[:12]}…); which ones this run means is not recorded"
    return f"its weights are the recorded ones (sha256 {reward.digest[:12]}…)"


def newly_made(weights: Path) -> list[str]:
    """Names of the weights that transformers would draw at random, since the folder lacks them. Loads no values.

    Raises ModelError for a folder that holds no model.
    """
    from transformers import AutoModelForSequenceClassification

    from models.quiet import quiet_transformers

    try:
        with quiet_transformers():
            _, report = AutoModelForSequenceClassification.from_pretrained(
                weights,
                device_map="meta",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # of many types, where config.json is not what transformers expects
        raise ModelError(
            f"{weights} cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    return sorted(report["missing_keys"])


def _check_agreement(alone: Sequence[float], rewards: Sequence[float], failed: str, how: str) -> None:
    for index, (a, b) in enumerate(zip(alone, rewards, strict=True)):
        if abs(a - b) > TOLERANCE * max(1.0, abs(a)):
            raise RewardServerError(
                f"{failed}: {PROBES[index][-1]['content']!r} gets the reward {a:.6f} alone and {b:.6f} {how}; a score "
                "must not depend on its batch. Check the attention mask and the pooling of the served model, and "
                "export it again"
            )
