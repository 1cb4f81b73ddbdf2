"""Reference answers in the pool: read with the prompts, laid out like samples, scored, selected, trained on."""

import json
from pathlib import Path

import pytest

from alignment.config import load_config
from alignment.embedded import policy_folder
from alignment.errors import ConfigError, DataError
from alignment.prompts import read_prompts
from alignment.records import step_record
from alignment.rollouts import generate
from alignment.selection import select
from alignment.stages import begin
from alignment.types import Prompt, Rollout, StepUpdate, with_reward
from models.policy import Policy, load_policy
from models.sampling import Sampling

SMOKE = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"
QUESTION = ({"role": "user", "content": "Why?"},)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The tiny policy: a token a byte, the ending token is 1."""
    return load_policy(policy_folder("tiny", tmp_path_factory.mktemp("cache")), prompt_format="text")


def rollouts(policy: Policy, *prompts: Prompt, with_references: bool = True) -> list[Rollout]:
    return [
        r
        for batch in generate(
            policy,
            prompts,
            samples_per_prompt=2,
            sampling=Sampling(max_new_tokens=6),
            batch_tokens=100,
            stream="test",
            with_references=with_references,
        )
        for r in batch
    ]


def test_a_reference_is_read_from_its_own_key_or_is_the_chosen_answer(tmp_path: Path) -> None:
    pair = {side: f"\n\nHuman: Why?\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    lines = [{"prompt": "Why?", "reference": "Because."}, pair, {"text": "Why?"}]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = read_prompts(str(source), tmp_path)
    assert [p.messages for p in prompts] == [QUESTION] * 3
    assert [p.reference for p in prompts] == ["Because.", "chosen", None]


@pytest.mark.parametrize("bad", ["", "  ", 7])
def test_a_reference_that_says_nothing_is_refused(tmp_path: Path, bad: object) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text(json.dumps({"prompt": "Why?", "reference": bad}) + "\n")
    with pytest.raises(DataError, match=r'prompts.jsonl:1: "reference" must be a text'):
        read_prompts(str(source), tmp_path)


def test_a_reference_follows_the_samples_as_one_more_rollout(policy: Policy) -> None:
    with_one, without = Prompt("a", QUESTION, "yes"), Prompt("b", QUESTION)
    drawn = rollouts(policy, with_one, without)
    assert [(r.prompt_id, r.rollout_index, r.is_reference) for r in drawn] == [
        ("a", 0, False), ("a", 1, False), ("b", 0, False), ("b", 1, False), ("a", 2, True)
    ]  # fmt: skip
    reference = drawn[-1]
    assert (reference.response, reference.finish_reason) == ("yes", "stop")
    assert policy.reader.tokenizer.convert_ids_to_tokens(reference.response_ids) == ["y", "e", "s", "<|eos|>"]
    assert reference.prompt_ids == drawn[0].prompt_ids
    # the samples are those that are drawn without it
    assert drawn[:4] == rollouts(policy, with_one, without, with_references=False)


def test_a_reference_longer_than_a_sample_may_be_is_cut_like_one(policy: Policy) -> None:
    exact, long = (rollouts(policy, Prompt("a", QUESTION, text))[-1] for text in ("12345", "123456"))
    assert (exact.response, exact.finish_reason, exact.num_tokens) == ("12345", "stop", 6)
    assert (long.response, long.finish_reason, long.num_tokens) == ("123456", "length", 6)


def test_the_best_is_selected_whoever_said_it_and_the_means_are_the_policys(policy: Policy) -> None:
    class Lengths:
        """A judge by hand."""

        def score(self, texts: list[str]) -> list[float]:
            return [float(i) for i, _ in enumerate(texts)]

    drawn = rollouts(policy, Prompt("a", QUESTION, "yes"))
    scored = [with_reward(r, reward, model="m", version="1") for r, reward in zip(drawn, (1.0, 2.0, 9.0), strict=True)]
    decisions = select(scored, strategy="top_per_prompt", top_n=1)
    assert [d.selected for d in decisions] == [False, False, True]
    assert [d.reason for d in decisions[1:]] == ["reward 2.0 ranks 2 of 3", "reference answer: reward 9.0 ranks 1 of 3"]
    update = StepUpdate(optimizer_steps=1, response_tokens=4, loss=1.0, kl=None, grad_norm=1.0, lr=1.0)
    record = step_record(1, scored, decisions, update, {"rollouts": 1.0}, judge=Lengths(), scoring_server={})  # type: ignore[arg-type]
    assert (record["reward_mean"], record["selected_reward_mean"], record["judge_mean"]) == (1.5, 9.0, 0.5)
    assert (record["num_rollouts"], record["num_selected"], record["num_selected_references"]) == (2, 1, 1)
    assert record["response_length_mean"] == (drawn[0].num_tokens + drawn[1].num_tokens) / 2
    assert record["selected_response_length_mean"] == drawn[2].num_tokens
    assert record["best_of_n"] == [1.5, 2.0]
    surprises = [-p for r in drawn[:2] for p in r.log_probs]
    assert record["entropy"] == pytest.approx(sum(surprises) / len(surprises))


def test_references_that_nobody_gave_cannot_join(tmp_path: Path) -> None:
    config = load_config(SMOKE, [f"run.root={tmp_path}", "rollouts.references=join"])
    with pytest.raises(ConfigError, match=r"rollouts\.references \(join\): none of the \d+ prompts of prompts\.train"):
        begin(config, "first")
