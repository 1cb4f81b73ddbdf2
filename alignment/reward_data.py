"""What a reward model learns from and is measured on: texts as it reads them, split by prompt.

The examples of `reward_training.train` are split into training, validation and test; equal prompts fall into one part.
`validation`, `held_out` and `also_measure` are read besides, without what was trained on, under their own names. What
measures shares no prompt with the set that chooses the checkpoint.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from alignment.config import Config
from alignment.errors import DataError
from alignment.preferences import conversation, read_pairs
from alignment.preparation import cache_folder
from alignment.ratings import read_ratings
from alignment.splits import split_by_prompt
from alignment.types import Conversation, PreferencePair, RatedAnswer

Item = PreferencePair | RatedAnswer

SHARE, TEST = "validation share", "test share"
"""Names of the sets that `reward_training.validation_share` and `test_share` set aside."""


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn: (chosen, rejected) with a margin, or one text with its labels (None: unlabelled)."""

    texts: tuple[str, ...]
    answers: tuple[str, ...] = ()
    """Of each text the part that was judged, which the rules about length look at."""
    margin: float | None = None
    labels: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class RewardData:
    """Examples to learn from, to validate on and to measure, the latter by name; what was left out, by set.

    The first validation set chooses the checkpoint.
    """

    train: tuple[Example, ...] = ()
    validation: dict[str, tuple[Example, ...]] = field(default_factory=dict)
    measured: dict[str, tuple[Example, ...]] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 of all examples."""
        examples = asdict(self)
        del examples["left_out"]  # counts of what is not there
        return hashlib.sha256(json.dumps(list(examples.values()), sort_keys=True).encode()).hexdigest()


def read_reward_data(config: Config) -> RewardData:
    """The data that the config names. Raises DataError or ConfigError."""
    own = config.reward_training
    left_out: dict[str, dict[str, int]] = {}
    parts: dict[str, list[Item]] = {"train": [], "validation": [], "test": []}
    if own.train:
        items, left_out["train"] = _training_items(config, own.train)
        parts = _split(config, items)
    learned = {_key(item): "prompt_trained_on" for item in parts["train"]}
    learned |= {_key(item): "prompt_of_validation_share" for item in parts["validation"]}
    tested = {_key(item): "prompt_of_test_share" for item in parts["test"]}
    validation: dict[str, Sequence[Item]] = {SHARE: parts["validation"]} if parts["validation"] else {}
    measured: dict[str, Sequence[Item]] = {TEST: parts["test"]} if parts["test"] else {}
    for source in own.validation:
        validation[source], left_out[source] = _unseen(config, source, learned | tested)
    chosen_by = {_key(item): "prompt_chose_checkpoint" for item in next(iter(validation.values()), ())}
    for source in filter(None, (own.held_out, *own.also_measure)):
        measured[source], left_out[source] = _unseen(config, source, learned | chosen_by)
    return RewardData(
        _examples(config, parts["train"]),
        {name: _examples(config, items) for name, items in validation.items()},
        {name: _examples(config, items) for name, items in measured.items()},
        left_out,
    )


def _unseen(config: Config, source: str, seen: Mapping[str, str]) -> tuple[Sequence[Item], dict[str, int]]:
    """A set of pairs without those whose prompt is among `seen`, and what was left out.

    `seen` is the reason by prompt. Raises DataError where nothing is left.
    """
    pairs, counts = read_pairs(source, cache_folder(config), limit=config.reward_training.num_held_out)
    reasons = Counter(seen[key] for key in map(_key, pairs) if key in seen)
    if reasons.total() == len(pairs):
        named = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
        raise DataError(
            f"{source}: all of its {len(pairs)} pairs are left out ({named}): name other data, or set "
            "reward_training.validation_share or reward_training.test_share"
        )
    left_out = {str(reason): n for reason, n in counts.items()} | reasons
    return [pair for pair in pairs if _key(pair) not in seen], left_out


def _training_items(config: Config, source: str) -> tuple[Sequence[Item], dict[str, int]]:
    """Pairs or rated answers, as the loss asks for, and what was left out by reason."""
    own, cache = config.reward_training, cache_folder(config)
    if own.loss == "regression":
        answers, unrated = read_ratings(source, cache, own.attributes, limit=own.num_train)
        for index, attribute in enumerate(own.attributes):
            if all(answer.labels[index] is None for answer in answers):
                raise DataError(
                    f"{source}: none of its {len(answers)} answers has a rating of {attribute}: remove it from "
                    "reward_training.attributes, or give ratings of it"
                )
        return answers, {str(reason): n for reason, n in unrated.items()}
    pairs, counts = read_pairs(source, cache, limit=own.num_train)
    without = next((number for number, pair in enumerate(pairs, start=1) if pair.margin is None), None)
    if own.loss == "scaled" and not any(pair.margin for pair in pairs):
        raise DataError(f"{source}: no pair has a margin above 0, so reward_training.loss (scaled) would learn nothing")
    if own.loss in ("margin", "scaled") and without:
        raise DataError(
            f"{source}: pair {without} has no margin, which reward_training.loss ({own.loss}) needs: give each pair "
            '"margin", or "score_chosen" and "score_rejected", or set reward_training.loss=bradley_terry'
        )
    return pairs, {str(reason): n for reason, n in counts.items()}


def _split(config: Config, items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items by part. Raises DataError where a part that the config asks for is empty."""
    own = config.reward_training
    if not own.validation_share and not own.test_share:
        return {"train": list(items), "validation": [], "test": []}
    shares = {"validation": own.validation_share, "test": own.test_share}
    shares["train"] = 1.0 - sum(shares.values())
    parts = split_by_prompt(items, _prompt, shares, config.seed)
    for name, share in shares.items():
        if share and not parts[name]:
            raise DataError(
                f"{own.train}: none of its {len(items)} examples fell into the {name} part (share {share:g} of the "
                "prompts): raise the share or reward_training.num_train"
            )
    return parts


def _prompt(item: Item) -> Conversation:
    """What an example is split by; of two plain texts, where nothing marks a prompt, the lines that both begin with."""
    if item.prompt:
        return item.prompt
    if isinstance(item, RatedAnswer):
        return conversation((), item.response)
    lines = zip(item.chosen.splitlines(), item.rejected.splitlines(), strict=False)
    shared = "\n".join(a for a, _ in itertools.takewhile(lambda both: both[0] == both[1], lines))
    return conversation((), shared if shared.strip() else item.chosen)


def _key(item: Item) -> str:
    return json.dumps([[message["role"], message["content"]] for message in _prompt(item)])


def _examples(config: Config, items: Sequence[Item]) -> tuple[Example, ...]:
    """Items as the reward model reads them."""
    from models.reward_model import render

    def texts(prompt: Conversation, *answers: str) -> tuple[str, ...]:
        return tuple(render(config.reward.template, conversation(prompt, answer)) for answer in answers)

    def example(item: Item) -> Example:
        if isinstance(item, RatedAnswer):
            return Example(texts(item.prompt, item.response), (item.response,), labels=item.labels)
        return Example(texts(item.prompt, item.chosen, item.rejected), (item.chosen, item.rejected), item.margin)

    return tuple(map(example, items))
