"""What supervised fine-tuning learns from: what is left out and where it is listed, what is set aside, what is read."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignment.config import load_config
from alignment.config_training import SftSection
from alignment.errors import ConfigError, DataError
from alignment.sft_data import prepare_examples, read_examples
from alignment.sft_training import SftTrainer, step_examples
from flow_runs import SMOKE


@pytest.fixture
def prepared(tmp_path):
    """Writes the examples of the smoke preset with overrides; returns summaries, what is read, what was left out."""

    def prepare(*overrides):
        config = load_config(SMOKE, [f"run.root={tmp_path}", *overrides])
        shutil.rmtree(tmp_path / "examples", ignore_errors=True)
        summaries = prepare_examples(config, tmp_path)
        lines = (tmp_path / "excluded_examples.jsonl").read_text().splitlines()
        return summaries, read_examples(config, tmp_path), [json.loads(line) for line in lines]

    return prepare


def write(path: Path, records) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def sums(count, first=0):
    return [{"input": f"{i}+1=", "output": str(i + 1)} for i in range(first, first + count)]


def test_what_is_left_out_is_counted_and_listed_with_file_and_line(prepared, tmp_path):
    chat = {"messages": [{"role": r, "content": "a"} for r in ("user", "assistant", "user", "assistant")]}
    path = write(tmp_path / "data.jsonl", [*sums(3), "{", {"input": "a" * 90, "output": "b" * 90}, chat])
    summaries, data, excluded = prepared(f"sft.train={path}", "sft.validation=null")
    (summary,) = summaries
    assert summary == {
        "role": "trained on", "source": path, "weight": 1.0, "examples": 3,
        "tokens": 3 * 6, "learned_tokens": 3 * 2, "left_out": {"malformed": 1, "not_rendered": 1, "too_long": 1},
    }  # fmt: skip
    assert [(item["place"], item["fault"]) for item in excluded] == [
        (f"{path}:4", "malformed"), (f"{path}:5", "too_long"), (f"{path}:6", "not_rendered")
    ]  # fmt: skip
    assert excluded[1]["details"] == f"{path}:5: 181 tokens, sft.max_tokens is 128"
    assert (len(data.train[0]), data.validation) == (3, None)
    assert data.train[0][0].learned == (False, False, False, False, True, True)


def test_a_set_of_which_nothing_is_left_is_an_error(prepared, tmp_path):
    path = write(tmp_path / "data.jsonl", sums(2))
    with pytest.raises(DataError, match=r"no example is left that can be trained on \(2 too_long; the last: .*:2: 6 "):
        prepared(f"sft.train={path}", "sft.max_tokens=4")
    with pytest.raises(DataError, match=r"validation share: no example is left that can be validated on \(the share"):
        prepared(f"sft.train={path}", "sft.validation=null", "sft.validation_share=1e-9")


def test_a_prompt_that_is_trained_on_does_not_validate(prepared, tmp_path):
    train, validation = write(tmp_path / "a.jsonl", sums(4)), write(tmp_path / "b.jsonl", sums(4, first=2))
    summaries, data, excluded = prepared(f"sft.train={train}", f"sft.validation={validation}")
    assert summaries[1]["left_out"] == {"prompt_trained_on": 2} and len(data.validation) == 2
    assert [item["place"] for item in excluded] == [f"{validation}:1", f"{validation}:2"]
    summaries, _, _ = prepared(f"sft.train={train}", f"sft.validation={validation}", "sft.num_validation=3")
    assert summaries[1]["examples"] == 1


def test_a_prompt_that_judges_the_result_is_not_trained_on(prepared, tmp_path):
    held_out = write(tmp_path / "held_out.jsonl", [{"text": "0+1="}, {"text": "1+1="}])
    test = write(tmp_path / "test.jsonl", [{"text": "2+1="}, {"chosen": "torn", "rejected": "torn too"}])
    train, validation = write(tmp_path / "a.jsonl", sums(5)), write(tmp_path / "b.jsonl", [*sums(3), *sums(2, first=9)])
    own = (f"prompts.held_out={held_out}", f"evaluation.prompts={test}", "sft.num_train=4")
    summaries, data, excluded = prepared(f"sft.train={train}", f"sft.validation={validation}", *own)
    assert summaries[0]["left_out"] == {"held_out_prompt": 3} and len(data.train[0]) == 1
    assert [(item["place"], item["fault"]) for item in excluded[:3]] == [
        (f"{train}:{line}", "held_out_prompt") for line in (1, 2, 3)
    ]
    assert [item["details"].split(" is one of ")[1] for item in excluded[1:3]] == [
        "prompts.held_out, which measures the policy", "evaluation.prompts, which measures the policy"
    ]  # fmt: skip
    # Read before it is known what remains of the training's: its prompts count as trained on.
    assert summaries[1]["left_out"] == {"prompt_trained_on": 3} and len(data.validation) == 2
    other = write(tmp_path / "c.jsonl", sums(3, first=20))
    summaries, data, excluded = prepared(f"sft.train={other}", f"sft.validation={validation}", *own)
    assert summaries[1]["left_out"] == {"held_out_prompt": 1} and len(data.validation) == 4
    with pytest.raises(
        DataError, match=r"no example is left that can be trained on \(2 held_out_prompt; the last: .*:2"
    ):
        prepared(f"sft.train={write(tmp_path / 'd.jsonl', sums(2))}", *own)


def test_of_a_conversation_each_answer_that_counts_has_its_prompt(prepared, tmp_path):
    turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcd", strict=True)]
    train = write(tmp_path / "chat.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    held_out = write(tmp_path / "held_out.jsonl", [{"messages": turns[:1]}])
    own = (f"sft.train={train}", f"prompts.held_out={held_out}", "sft.validation=null", "policy.prompt_format=chat")
    assert prepared(*own, "sft.turns=last")[0][0]["left_out"] == {"held_out_prompt": 1}
    with pytest.raises(DataError, match="2 held_out_prompt"):
        prepared(*own)


def test_a_share_is_set_aside_by_prompt(prepared, tmp_path):
    records = [{"input": f"{i % 20}?", "output": str(i)} for i in range(100)]
    path = write(tmp_path / "a.jsonl", records)
    summaries, data, _ = prepared(f"sft.train={path}", "sft.validation=null", "sft.validation_share=0.3")
    assert [s["source"] for s in summaries] == [path, "validation share"]
    prompts = [{s.ids[: s.learned.index(True)] for s in part} for part in (data.train[0], data.validation)]
    assert len(data.train[0]) + len(data.validation) == 100 and len(prompts[0]) + len(prompts[1]) == 20
    assert not prompts[0] & prompts[1] and prompts[1]


def test_several_sources_are_read_by_their_weights(prepared, tmp_path):
    large, small = write(tmp_path / "large.jsonl", sums(30)), write(tmp_path / "small.jsonl", sums(10, first=100))
    mixture = json.dumps({large: 1, small: 3})
    summaries, data, _ = prepared(f"sft.train={mixture}", "sft.validation=null", "sft.num_train=20")
    assert [(s["source"], s["weight"], s["examples"]) for s in summaries] == [(large, 1.0, 20), (small, 3.0, 10)]
    trainer = SftTrainer(None, SftSection(global_batch_size=4), SimpleNamespace(), data, seed=0)
    assert (trainer.steps_per_epoch, trainer.total_steps) == (8, 8)  # 30 examples an epoch
    small_ones = {s.ids for s in data.train[1]}
    read = [s.ids for step in range(1, 25) for s in step_examples(trainer, step)]  # three epochs
    assert Counter(ids in small_ones for ids in read) == {False: 3 * 8, True: 3 * 22}  # of 7.5 and 22.5
    assert len({ids for ids in read if ids not in small_ones}) == 20
    assert [len(step_examples(trainer, step)) for step in (1, 8, 9)] == [4, 2, 4]


def test_what_cannot_be_is_refused_with_a_remedy(prepared, tmp_path):
    with pytest.raises(ConfigError, match=r"sft\.max_tokens \(512\) must be <= the policy's context of 256 tokens"):
        prepared("sft.max_tokens=512")
    with pytest.raises(ConfigError, match=r"sft\.validation \(.*\) and sft\.validation_share \(0\.1\) both choose"):
        prepared("sft.validation_share=0.1")
    with pytest.raises(ConfigError, match=r"sft\.chat_template is given, and policy\.prompt_format is text"):
        prepared("sft.chat_template=x")
    with pytest.raises(ConfigError, match=r"sft\.train\.a\.jsonl \(-1\): input should be greater than 0"):
        prepared("sft.train={a.jsonl: -1}")
    with pytest.raises(ConfigError, match=r"sft\.train \(\{\}\)"):
        prepared("sft.train={}")


def test_hh_transcripts_are_read_as_every_answer_of_the_chosen_side(prepared, tmp_path):
    chosen = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    path = write(tmp_path / "hh.jsonl", [{"chosen": chosen, "rejected": chosen.replace("d", "e")}])
    also = (f"sft.train={path}", "sft.validation=null", "policy.prompt_format=chat")
    learned = [prepared(*also, f"sft.turns={turns}")[0][0]["learned_tokens"] for turns in ("all", "last")]
    assert learned == [4, 2]  # "b" and "d", each with its ending token
