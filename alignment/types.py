"""The carriers that pass between stages. All are frozen: a stage returns new ones and changes none.

    Prompt ──rollouts──► Rollout ──scoring──► ScoredRollout ──selection──► Decision ──update──► StepUpdate

Rollouts are grouped by `prompt_id`, never by text or token ids: two prompts may share a text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

FinishReason = Literal["stop", "length"]


class Message(TypedDict):
    """One turn of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Conversation = Sequence[Message]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for the policy's answer. A plain text is one message of the user.

    `reference` is an answer that somebody wrote, which may join the policy's own; None where there is none.
    """

    prompt_id: str
    messages: tuple[Message, ...]
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two conversations of which the first is preferred. `prompt` holds the messages that both share.

    `margin` says how clearly it is preferred, finite and ≥ 0 in the data's own unit; None where nobody said.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class RatedAnswer:
    """An answer with one rating per attribute, in an order that its reader was given.

    A label is finite, in the data's own unit; None where the answer was not rated by that attribute.
    """

    prompt: tuple[Message, ...]
    response: str
    labels: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A conversation to imitate. `learned` says of each message whether its text is; `place` is "file:line".

    Only assistant's messages are ever learned, at least one of them is, and the last message is.
    """

    messages: tuple[Message, ...]
    learned: tuple[bool, ...]
    place: str


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A demonstration as the policy reads it. `learned` says of each token whether the loss counts it.

    The first token never is, since nothing predicts it; the last one always is.
    """

    ids: tuple[int, ...]
    learned: tuple[bool, ...]

    @property
    def num_learned(self) -> int:
        """Tokens that the loss counts."""
        return sum(self.learned)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A record that cannot be used: where it stands ("file:line"), what kind of fault it has, and what was found."""

    place: str
    fault: str
    details: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response to a prompt.

    `response_ids` ends with the ending token, or with the tokens of a stop string, when `finish_reason` is "stop";
    `response` holds neither. `prompt` is the text that the policy read, `messages` the conversation that the reward
    model will see before the response. `log_probs` are natural logarithms of each token's probability under the policy
    at temperature 1 with nothing restricted. A prompt's reference answer is a rollout too, with the index after the
    last sample's and no log_probs.
    """

    prompt_id: str
    rollout_index: int
    response: str
    finish_reason: FinishReason
    prompt: str = ""
    messages: tuple[Message, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    response_ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    is_reference: bool = False

    @property
    def num_tokens(self) -> int:
        """Response tokens, the ending token included."""
        return len(self.response_ids)

    @property
    def log_prob(self) -> float | None:
        """Natural logarithm of the response's probability under the policy; None where the policy did not draw it."""
        return sum(self.log_probs) if self.log_probs else None

    @property
    def conversation(self) -> list[Message]:
        """Prompt and response as the reward model reads them."""
        return [*self.messages, {"role": "assistant", "content": self.response}]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout(Rollout):
    """A rollout with its reward (the reward model's scalar, no unit, higher is better) and who gave it.

    Where several models score, `member_rewards` holds what each of those gave that make the reward together, and
    `shadow_rewards` what each gave that only looks on; keys are "name/version".
    """

    reward: float
    reward_model: str = ""
    reward_model_version: str = ""
    member_rewards: Mapping[str, float] = field(default_factory=dict)
    shadow_rewards: Mapping[str, float] = field(default_factory=dict)


def with_reward(rollout: Rollout, reward: float, *, model: str, version: str, **by_model: Any) -> ScoredRollout:
    """The rollout with its reward and the name and version of the reward model that gave it.

    `by_model` is `member_rewards` and `shadow_rewards`.
    """
    kept = {field.name: getattr(rollout, field.name) for field in fields(Rollout)}
    return ScoredRollout(**kept, reward=reward, reward_model=model, reward_model_version=version, **by_model)


@dataclass(frozen=True, slots=True)
class Decision:
    """What selection decided about one rollout, and why."""

    prompt_id: str
    rollout_index: int
    selected: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepUpdate:
    """One RS step's fine-tuning: sums over its optimizer steps.

    `loss` is nats per response token, a KL penalty included; `kl` is the KL to the base of the texts trained on, nats
    per response token, None without a penalty. `grad_norm` is the
    largest norm before clipping, `lr` the rate used.
    An empty selection gives `optimizer_steps` 0 and no loss.
    """

    optimizer_steps: int
    response_tokens: int
    loss: float | None
    kl: float | None = None
    grad_norm: float | None
    lr: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A reference to a checkpoint folder; small enough for a Metaflow artifact."""

    uri: str
    sha256: str
    step: int


@dataclass(frozen=True, slots=True)
class RewardModelRef:
    """One version of a reward model in a Triton repository: what scores are recorded under.

    `accuracy` is the share of held-out pairs ranked right (None where it was not measured here),
    `digest` the sha256 of the version's weights.
    """

    name: str
    version: str
    digest: str
    repository: str
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class JudgeRef:
    """The independent judge, which is reported and never selects. `uri` is its folder."""

    name: str
    uri: str
    accuracy: float
    details: dict[str, Any] = field(default_factory=dict)
