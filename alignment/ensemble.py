"""Several reward models of one Triton server: members whose scores make the reward together, shadows that look on.

A **weighted sum** is `Σ weight · score`. The weights are taken as given, so members need one scale: a member whose
scores spread ten times as wide decides ten times as much. `reward.output=standardized` gives each export that scale.

A **vote** needs no scale: every member compares the distinct responses to a prompt pairwise, and a response's reward is
the share of the others that it beats, ties one half, averaged over members by weight (a Borda count). It lies between 0
and 1 and its mean over a prompt is one half, so the members' means are recorded beside it. Scores are compared rounded
as selection does. A vote ranks responses to one prompt against each other and says nothing of one by itself: validation
and evaluation, which have one response a prompt, take the score of the first member, reward.name.

Shadows score the same responses; `alignment.records` and `alignment.over_optimisation` treat them as the judge.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal

from alignment.score_cache import ScoreCache
from alignment.scoring import RewardClient, in_background, score_in_background, score_rollouts
from alignment.selection import rounded
from alignment.types import Rollout, ScoredRollout

Combine = Literal["weighted_sum", "vote"]


@dataclass(frozen=True, slots=True)
class Ensemble:
    """The clients of a run's reward models, one weight a member; the first member is reward.name.

    One member without shadows is the reward model alone: then nothing is added to what it says.
    """

    members: tuple[RewardClient, ...]
    weights: tuple[float, ...] = (1.0,)
    combine: Combine = "weighted_sum"
    shadows: tuple[RewardClient, ...] = ()
    caches: tuple[ScoreCache, ...] = ()
    """The scores that each of the clients has given before, where `reuse.scores` keeps them."""

    @property
    def clients(self) -> tuple[RewardClient, ...]:
        """All of them, members first."""
        return (*self.members, *self.shadows)

    @property
    def model_name(self) -> str:
        """What rewards are recorded under: the members' names, "a+b"."""
        return "+".join(client.model_name for client in self.members)

    @property
    def model_version(self) -> str:
        """The members' versions in the order of their names, "1+3". Raises RewardServerError."""
        return "+".join(client.model_version for client in self.members)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait for all of them, up to `timeout_s` seconds each. Raises RewardServerError."""
        for client in self.clients:
            client.wait_ready(timeout_s)

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """The rollouts with their rewards, each judged by itself, in order. Raises RewardError.

        That is the weighted sum; where members vote, it is the first member's score until `compared`.
        """
        caches = self.caches or (None,) * len(self.clients)
        (first, kept), *others = zip(self.clients, caches, strict=True)
        pending = [score_in_background(client, rollouts, cache) for client, cache in others]
        scored = score_rollouts(first, rollouts, kept)
        if not others or not rollouts:
            return scored
        columns = [scored, *(future.result() for future in pending)]
        names = [f"{column[0].reward_model}/{column[0].reward_model_version}" for column in columns]
        return [self._summed(rewards, names) for rewards in zip(*columns, strict=True)]

    def take_counts(self) -> dict[str, int] | None:
        """`hits`, conversations that the caches knew since the last call, and `misses`; None without caches."""
        if not self.caches:
            return None
        hits, misses = zip(*(cache.take_counts() for cache in self.caches), strict=True)
        return {"hits": sum(hits), "misses": sum(misses)}

    def score_in_background(self, rollouts: Sequence[Rollout]) -> Future[list[ScoredRollout]]:
        """`score` while the caller generates. Raises RewardServerError once the clients are closed."""
        return in_background(self.members[0], self.score, rollouts)

    def compared(self, scored: Sequence[ScoredRollout]) -> list[ScoredRollout]:
        """Scored rollouts, all that each prompt has, with the reward that selection compares."""
        if self.combine != "vote":
            return list(scored)
        given: dict[str, dict[str, Mapping[str, float]]] = {}
        for r in scored:
            given.setdefault(r.prompt_id, {})[r.response] = r.member_rewards
        shares = {
            prompt_id: dict(zip(responses, self._votes(list(responses.values())), strict=True))
            for prompt_id, responses in given.items()
        }
        return [self._named(r, shares[r.prompt_id][r.response]) for r in scored]

    def knows(self, row: Mapping[str, Any]) -> bool:
        """Whether a stored row of rollouts/*.parquet was scored by just these models."""
        shadows = {f"{client.model_name}/{client.model_version}" for client in self.shadows}
        return (row["reward_model"], row["reward_model_version"]) == (self.model_name, self.model_version) and set(
            by_model(row, "shadow_rewards")
        ) == shadows

    def _summed(self, rewards: Sequence[ScoredRollout], names: Sequence[str]) -> ScoredRollout:
        """One rollout from what each client made of it."""
        count = len(self.members)
        scores = [r.reward for r in rewards]
        by_name = list(zip(names, scores, strict=True))
        one = replace(
            rewards[0],
            member_rewards=dict(by_name[:count]) if count > 1 else {},
            shadow_rewards=dict(by_name[count:]),
        )
        if count == 1 or self.combine == "vote":
            return one
        return self._named(one, weighted_sum(scores[:count], self.weights))

    def _votes(self, responses: Sequence[Mapping[str, float]]) -> list[float]:
        """The reward of each distinct response of a prompt."""
        return vote(list(zip(*(rewards.values() for rewards in responses), strict=True)), self.weights)

    def _named(self, rollout: ScoredRollout, reward: float) -> ScoredRollout:
        return replace(rollout, reward=reward, reward_model=self.model_name, reward_model_version=self.model_version)


def weighted_sum(scores: Sequence[float], weights: Sequence[float]) -> float:
    """The reward of one response from each member's score."""
    return sum(weight * score for weight, score in zip(weights, scores, strict=True))


def vote(scores: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """The rewards of a prompt's distinct responses (n,) from each member's scores of them (members, n).

    A single response, which has nothing to beat, gets one half.
    """
    count = len(scores[0])
    if count == 1:
        return [0.5]
    won = [0.0] * count
    for row, weight in zip(scores, weights, strict=True):
        compared = [rounded(score) for score in row]
        for i, mine in enumerate(compared):
            # A response ties with itself, which is no other.
            beaten = sum((mine > other) + (mine == other) / 2 for other in compared) - 0.5
            won[i] += weight * beaten
    return [w / (sum(weights) * (count - 1)) for w in won]


def by_model(row: Mapping[str, Any], column: str) -> dict[str, float]:
    """A column of scores by "name/version" from a stored row; empty where one model alone scored."""
    return dict(row.get(column) or ())
