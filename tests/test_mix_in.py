"""The SFT mix-in: which demonstrations an RS step trains on, and how they are laid out."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.config import Config, load_config
from alignment.embedded import policy_folder
from alignment.errors import DataError
from alignment.evaluation_stage import prepare_prompts
from alignment.mix_in import load_mix_in, mixed
from alignment.policy_source import PolicySource
from alignment.preparation import load_prompts
from alignment.run_folder import RunFolder
from alignment.stages import begin
from alignment.toy import toy_demonstrations
from alignment.types import Checkpoint, Rollout

SMOKE = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"


def rollout(name: str) -> Rollout:
    return Rollout(prompt_id=name, rollout_index=0, response="", finish_reason="stop")


def config(root: Path | None = None, *overrides: str) -> Config:
    own = ["training.sft_mix=toy:demonstrations", "training.num_sft_examples=2", *overrides]
    return load_config(SMOKE, [*own, *([f"run.root={root}"] if root else [])])


def test_demonstrations_are_spread_evenly_among_the_selected() -> None:
    selected, demonstrations = [rollout(f"s{i}") for i in range(4)], [rollout("d0"), rollout("d1")]
    names = [r.prompt_id for r in mixed(selected, demonstrations, config(), step=1)]
    # selected at 1/8, 3/8, 5/8, 7/8, demonstrations at 1/4, 3/4
    assert [name[0] for name in names] == ["s", "d", "s", "s", "d", "s"]
    assert sorted(names) == ["d0", "d1", "s0", "s1", "s2", "s3"]


def test_an_epoch_of_steps_reads_each_demonstration_once() -> None:
    demonstrations = [rollout(f"d{i}") for i in range(6)]
    steps = [mixed([rollout("s")], demonstrations, config(), step) for step in (1, 2, 3, 4)]
    read = [[r.prompt_id for r in step if r.prompt_id != "s"] for step in steps]
    assert Counter(name for names in read[:3] for name in names) == Counter(f"d{i}" for i in range(6))
    assert len(set(read[3])) == 2
    assert read == [
        [r.prompt_id for r in mixed([rollout("s")], demonstrations, config(), step) if r.prompt_id != "s"]
        for step in (1, 2, 3, 4)
    ]


def test_a_step_without_selected_responses_trains_on_nothing() -> None:
    assert mixed([], [rollout("d0"), rollout("d1")], config(), step=1) == []
    assert mixed([rollout("s")], [], config(), step=1) == [rollout("s")]


def test_a_demonstration_is_laid_out_like_a_selected_response(tmp_path: Path) -> None:
    own = config(tmp_path)
    run, _ = begin(own, "first")
    demonstrations = load_mix_in(own, Path(run))
    question, answer = toy_demonstrations("toy:demonstrations")[0]
    first = demonstrations[0]
    specials = 3  # padding, ending token, beginning of a turn; then a token a byte
    assert len(first.prompt_ids) == len(question) and len(first.response_ids) == len(answer) + 1
    assert first.response_ids[-1] == 1 and min((*first.prompt_ids, *first.response_ids[:-1])) >= specials
    assert len(demonstrations) == len(toy_demonstrations("toy:demonstrations"))
    assert load_mix_in(load_config(SMOKE), Path(run)) == ()


def test_held_out_prompts_are_nobodys_demonstration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 24 of the 80 held-out prompts measure the policy; their demonstrations are left out
    run, _ = begin(config(tmp_path, "training.sft_mix=toy:held_out_demonstrations"), "first")
    assert len((Path(run) / "prompts" / "mix_in.jsonl").read_text().splitlines()) == 56
    assert len((Path(run) / "excluded_examples.jsonl").read_text().splitlines()) == 24
    assert "56 demonstrations of toy:held_out_demonstrations, left out: 24 held_out_prompt" in capsys.readouterr().out


def test_an_evaluation_leaves_out_the_prompts_of_demonstrations_that_were_trained_on(tmp_path: Path) -> None:
    own = config(tmp_path, "training.sft_mix=toy:held_out_demonstrations")
    learned, _ = begin(own, "first")
    folder = str(policy_folder("tiny", tmp_path / "cache"))
    base = PolicySource(Checkpoint(folder, "", 0), folder, None, None)
    # Another seed: its evaluation prompts are among those that the run neither validated with nor evaluated on.
    other = load_config(SMOKE, [f"run.root={tmp_path}", "seed=5", "evaluation.num_prompts=60"])
    mixed_in = {prompt.messages[0]["content"] for prompt in load_prompts(Path(learned), "mix_in")}
    chosen = []
    for name, source in (("unknown", base), ("known", replace(base, run=Path(learned)))):
        prepare_prompts(other, RunFolder(tmp_path / name), source, base)
        chosen.append({prompt.messages[0]["content"] for prompt in load_prompts(tmp_path / name, "evaluation")})
    assert chosen[0] & mixed_in and not chosen[1] & mixed_in and chosen[1]


def test_too_few_demonstrations_are_an_error_before_anything_is_trained(tmp_path: Path) -> None:
    source = tmp_path / "few.jsonl"
    source.write_text('{"input": "a", "output": " b"}\n' + '{"input": "' + "long " * 50 + '", "output": " b"}\n')
    with pytest.raises(DataError, match=r"has 1 usable demonstrations, and training.num_sft_examples is 2"):
        begin(config(tmp_path, f"training.sft_mix={source}"), "first")
