"""Rollouts of prompts: whole prompts at a time, memory that does not suffice, stop strings in a text."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from alignment.embedded import policy_folder
from alignment.errors import ConfigError, DataError
from alignment.rollouts import Lowered, generate
from alignment.types import Prompt, Rollout
from models.policy import Policy, load_policy
from models.sampling import Sampling

PROMPTS = [Prompt(str(i), ({"role": "user", "content": "x" * n},)) for i, n in enumerate((3, 12, 7, 1, 9))]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The tiny policy: a token a byte, the ending token is 1."""
    return load_policy(policy_folder("tiny", tmp_path_factory.mktemp("cache")), prompt_format="text")


def lists(policy: Policy, sampling: Sampling, batch_tokens: int, **others: Any) -> list[list[Rollout]]:
    found = generate(
        policy, PROMPTS, samples_per_prompt=3, sampling=sampling, batch_tokens=batch_tokens, stream="test", **others
    )
    return list(found)


def by_key(found: list[list[Rollout]]) -> dict[tuple[str, int], Rollout]:
    return {(r.prompt_id, r.rollout_index): r for some in found for r in some}


class NoMemory:
    """Stands in for a machine whose memory holds `rows` rows: a model that reads more of them fails as there."""

    def __init__(self, model: Any, rows: int, error: BaseException) -> None:
        self.model, self.rows, self.error, self.failed = model, rows, error, 0

    def __enter__(self) -> "NoMemory":
        self.model.forward, self._real = self._forward, self.model.forward
        return self

    def __exit__(self, *_: object) -> None:
        self.model.forward = self._real

    def _forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        if len(input_ids) > self.rows:
            self.failed += 1
            raise self.error
        return self._real(input_ids=input_ids, **others)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


def test_each_list_holds_all_rollouts_of_its_prompts(policy: Policy) -> None:
    found = lists(policy, Sampling(10), batch_tokens=60)
    assert len(found) > 1
    for some in found:
        ids = [r.prompt_id for r in some]
        assert all(ids.count(i) == 3 for i in set(ids))
    assert sorted(by_key(found)) == [(p.prompt_id, k) for p in PROMPTS for k in range(3)]
    for r in by_key(found).values():
        assert len(r.log_probs) == r.num_tokens and r.log_prob == pytest.approx(sum(r.log_probs))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_answered_by_fewer_rows_and_the_same_rollouts(policy: Policy, error: BaseException) -> None:
    expected, notes = by_key(lists(policy, Sampling(10), batch_tokens=1000)), []
    with NoMemory(policy.model, 4, error) as machine:
        got = by_key(lists(policy, Sampling(10), batch_tokens=1000, on_note=notes.append))
    assert machine.failed == len(notes) > 0
    assert notes[0].startswith("out of memory while generating: 5 prompts begin anew with ")
    assert notes[0].endswith("; set rollouts.batch_tokens to that")
    assert {k: r.response_ids for k, r in got.items()} == {k: r.response_ids for k, r in expected.items()}


def test_memory_that_did_not_suffice_is_remembered_by_the_next_call(policy: Policy) -> None:
    expected, lowered, notes = by_key(lists(policy, Sampling(10), batch_tokens=1000)), Lowered(), []
    with NoMemory(policy.model, 4, ERRORS[0]) as machine:
        lists(policy, Sampling(10), batch_tokens=1000, on_note=notes.append, lowered=lowered)
        assert f" with {lowered.tokens} tokens " in notes[-1]
        failed = machine.failed
        got = by_key(lists(policy, Sampling(10), batch_tokens=1000, on_note=notes.append, lowered=lowered))
    assert machine.failed == failed == len(notes) > 0
    assert {k: r.response_ids for k, r in got.items()} == {k: r.response_ids for k, r in expected.items()}
    lists(policy, Sampling(20), batch_tokens=1000, lowered=Lowered(5))  # a longer response than was found to fit: tried
    with pytest.raises(ConfigError, match=r"rollouts\.batch_tokens \(5\) must be >= "):
        lists(policy, Sampling(20), batch_tokens=5, lowered=Lowered(3))


def test_a_stop_string_that_is_a_special_token_ends_a_response_as_an_ending_token(policy: Policy) -> None:
    free = by_key(lists(policy, Sampling(10), batch_tokens=1000))
    token = next(r.response_ids[2] for r in free.values() if r.num_tokens > 3)
    tokenizer = copy.deepcopy(policy.reader.tokenizer)
    name = tokenizer.convert_ids_to_tokens(token)
    tokenizer.add_special_tokens({"additional_special_tokens": [name]})
    marked = replace(policy, reader=replace(policy.reader, tokenizer=tokenizer))
    stopped = by_key(lists(marked, Sampling(10, stop=(name,)), batch_tokens=1000))
    for key, r in stopped.items():
        whole = free[key].response_ids
        length = whole.index(token) + 1 if token in whole else len(whole)
        assert r.response_ids == whole[:length] and name not in r.response
        assert r.finish_reason == ("stop" if token in whole else free[key].finish_reason)
    with pytest.raises(ConfigError, match=r"rollouts\.stop .*Name the token by itself"):
        lists(marked, Sampling(10, stop=(name + "\n",)), batch_tokens=1000)


def test_a_prompt_without_tokens_is_named(policy: Policy) -> None:
    empty = [Prompt("seven", ({"role": "user", "content": ""},))]
    with pytest.raises(DataError, match="prompt seven has no tokens"):
        next(generate(policy, empty, samples_per_prompt=1, sampling=Sampling(3), batch_tokens=99, stream="test"))


def test_a_machine_that_holds_no_response_is_an_error_that_says_what_to_lower(policy: Policy) -> None:
    with (
        NoMemory(policy.model, 0, ERRORS[0]),
        pytest.raises(ConfigError, match=r"22 tokens with its prompt: lower rollouts\.max_new_tokens"),
    ):
        lists(policy, Sampling(10), batch_tokens=1000, on_note=lambda _: None)


def test_another_error_is_no_lack_of_memory(policy: Policy) -> None:
    with NoMemory(policy.model, 0, RuntimeError("shapes differ")), pytest.raises(RuntimeError, match="shapes differ"):
        lists(policy, Sampling(10), batch_tokens=1000)


def test_a_stop_string_cuts_the_text_and_stays_in_the_tokens(policy: Policy) -> None:
    free = by_key(lists(policy, Sampling(10), batch_tokens=1000))
    stop = next(c for r in free.values() for c in r.response[2:6] if c.isascii() and c.isprintable())
    stopped = by_key(lists(policy, Sampling(10, stop=(stop,)), batch_tokens=1000))
    held = [key for key, r in free.items() if stop in r.response]
    assert held
    for key, r in stopped.items():
        whole = free[key]
        assert r.response == whole.response.split(stop)[0]
        assert r.response_ids == whole.response_ids[: r.num_tokens]
        if key in held:
            assert r.finish_reason == "stop"
            assert stop in policy.reader.decode(r.prompt_ids, r.response_ids)
