"""What a reward model learns from: parts by prompt, margins and ratings that are not there, what was left out."""

import json

import pytest

from alignment.config import load_config
from alignment.errors import DataError
from alignment.reward_data import SHARE, TEST, read_reward_data
from flow_runs import SMOKE


def config(tmp_path, *overrides):
    settings = {"run.root": tmp_path, "reward_training.held_out": "null"}
    return load_config(SMOKE, [*(f"{key}={value}" for key, value in settings.items()), *overrides])


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"reward_training.train={path}"


def pair(prompt, number, **more):
    return {"prompt": prompt, "chosen": f"good {number}", "rejected": f"bad {number}", **more}


def test_equal_prompts_fall_into_one_part_and_no_example_is_lost(tmp_path):
    records = [pair(f"question {i % 30}?", i) for i in range(120)]
    shares = ("reward_training.validation_share=0.2", "reward_training.test_share=0.3")
    data = read_reward_data(config(tmp_path, write(tmp_path / "pairs.jsonl", records), *shares))
    parts = [data.train, data.validation[SHARE], data.measured[TEST]]
    assert sorted(e.texts for part in parts for e in part) == sorted(
        (f"{r['prompt']}{r['chosen']}", f"{r['prompt']}{r['rejected']}") for r in records
    )
    prompts = [{e.texts[0].partition("?")[0] for e in part} for part in parts]
    assert all(prompts) and not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]


def test_pairs_without_a_prompt_are_split_too(tmp_path):
    data = read_reward_data(config(tmp_path, "reward_training.test_share=0.5"))
    assert len(data.train) + len(data.measured[TEST]) == 512
    assert min(len(data.train), len(data.measured[TEST])) > 200


def test_a_part_that_is_asked_for_and_empty_is_an_error(tmp_path):
    source = write(tmp_path / "pairs.jsonl", [pair("the same", i) for i in range(9)])
    with pytest.raises(DataError, match=r"none of its 9 examples fell into the (validation|train) part"):
        read_reward_data(config(tmp_path, source, "reward_training.validation_share=0.5"))


def test_margins_are_read_and_missed_by_the_losses_that_need_them(tmp_path):
    source = write(tmp_path / "pairs.jsonl", [pair("q", 1, margin=2), pair("q", 2)])
    assert [e.margin for e in read_reward_data(config(tmp_path, source)).train] == [2, None]
    with pytest.raises(DataError, match=r"pair 2 has no margin, which reward_training\.loss \(scaled\) needs"):
        read_reward_data(config(tmp_path, source, "reward_training.loss=scaled"))


def test_ratings_are_read_and_an_attribute_without_any_is_an_error(tmp_path):
    answers = [{"prompt": "q", "response": "a", "ratings": {"helpful": 3, "short": None}}]
    source, loss = write(tmp_path / "ratings.jsonl", answers), "reward_training.loss=regression"
    (example,) = read_reward_data(config(tmp_path, source, loss, "reward_training.attributes=[helpful]")).train
    assert (example.texts, example.labels) == (("qa",), (3,))
    with pytest.raises(DataError, match=r"none of its 1 answers has a rating of short: remove it from reward_train"):
        read_reward_data(config(tmp_path, source, loss, "reward_training.attributes=[helpful, short]"))


def test_what_is_left_out_is_counted_by_source(tmp_path):
    records = [pair("q", 1), {**pair("q", 2), "rejected": "good 2"}, {**pair("q", 3), "chosen": " "}]
    source = write(tmp_path / "pairs.jsonl", records)
    held_out = tmp_path / "held_out.jsonl"
    write(held_out, [pair("q", 4), pair("another q", 5)])
    data = read_reward_data(config(tmp_path, source, f"reward_training.held_out={held_out}"))
    assert data.left_out == {"train": {"identical": 1, "malformed": 1}, str(held_out): {"prompt_trained_on": 1}}
    assert [e.answers for e in data.measured[str(held_out)]] == [("good 5", "bad 5")]
    with pytest.raises(DataError, match=r"all of its 1 pairs are left out \(1 prompt_trained_on\): name other data"):
        read_reward_data(config(tmp_path, source, f"reward_training.held_out={tmp_path / 'pairs.jsonl'}"))


def test_what_measures_shares_no_prompt_with_the_set_that_chooses_the_checkpoint(tmp_path):
    def source(name, *prompts):
        write(tmp_path / f"{name}.jsonl", [pair(prompt, i) for i, prompt in enumerate(prompts)])
        return str(tmp_path / f"{name}.jsonl")

    train, chooses, also = source("train", "a", "b"), source("chooses", "b", "c", "d"), source("also", "d", "e")
    held_out = source("held_out", "a", "c", "e", "f")
    sets = [f"reward_training.validation=[{chooses}, {also}]", f"reward_training.held_out={held_out}"]
    data = read_reward_data(config(tmp_path, f"reward_training.train={train}", *sets))
    prompts = {name: [e.texts[0].partition("good")[0] for e in part] for name, part in data.validation.items()}
    assert prompts == {chooses: ["c", "d"], also: ["d", "e"]}
    # "e" only reports on the training; "c" had a say in which checkpoint is measured.
    assert [e.texts[0] for e in data.measured[held_out]] == ["egood 2", "fgood 3"]
    assert data.left_out[held_out] == {"prompt_trained_on": 1, "prompt_chose_checkpoint": 1}
    with pytest.raises(DataError, match=r"all of its 3 pairs are left out \(1 prompt_trained_on, 2 prompt_chose_check"):
        read_reward_data(
            config(tmp_path, f"reward_training.train={train}", sets[0], f"reward_training.held_out={chooses}")
        )


def test_prompts_of_the_validation_share_are_left_out_as_such(tmp_path):
    train = write(tmp_path / "pairs.jsonl", [pair(f"question {i}?", i) for i in range(40)])
    for name in ("held_out", "validates"):
        write(tmp_path / f"{name}.jsonl", [pair(f"question {i}?", i) for i in range(41)])
    held_out, validates = (str(tmp_path / f"{name}.jsonl") for name in ("held_out", "validates"))
    sets = (f"reward_training.held_out={held_out}", f"reward_training.validation=[{validates}]")
    data = read_reward_data(config(tmp_path, train, "reward_training.validation_share=0.5", *sets))
    aside = len(data.validation[SHARE])
    assert data.left_out[held_out] == {"prompt_trained_on": 40 - aside, "prompt_chose_checkpoint": aside}
    assert data.left_out[validates] == {"prompt_trained_on": 40 - aside, "prompt_of_validation_share": aside}


def test_a_validation_set_shares_no_prompt_with_the_test_share(tmp_path):
    train = write(tmp_path / "pairs.jsonl", [pair(f"question {i}?", i) for i in range(40)])
    write(tmp_path / "same.jsonl", [pair(f"question {i}?", i) for i in range(41)])
    sets = ("reward_training.test_share=0.5", f"reward_training.validation=[{tmp_path / 'same.jsonl'}]")
    data = read_reward_data(config(tmp_path, train, *sets))
    tested = len(data.measured[TEST])
    assert data.left_out[str(tmp_path / "same.jsonl")] == {
        "prompt_trained_on": 40 - tested,
        "prompt_of_test_share": tested,
    }
    (left,) = data.validation[str(tmp_path / "same.jsonl")]
    assert left.texts[0] == "question 40?good 40"


def test_plain_texts_are_split_by_the_lines_that_both_begin_with(tmp_path):
    records = []
    for i in range(90):
        for side in ("good", "bad"):
            records.append({"text": f"<user> question {i % 30}\n<assistant>\n{side} {i}"})
    data = read_reward_data(
        config(tmp_path, write(tmp_path / "pairs.jsonl", records), "reward_training.test_share=0.4")
    )
    train, test = ({e.texts[0].splitlines()[0] for e in part} for part in (data.train, data.measured[TEST]))
    assert len(train) + len(test) == 30 and train and test


def test_the_digest_is_that_of_the_texts(tmp_path):
    first, again = (read_reward_data(config(tmp_path)).digest for _ in range(2))
    assert first == again != read_reward_data(config(tmp_path, "reward_training.num_train=511")).digest
