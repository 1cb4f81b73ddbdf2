"""The evaluation's numbers from made-up samples, its prompts, and lm-evaluation-harness on a local task."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch

from alignment.config import Config, load_config
from alignment.embedded import policy_folder
from alignment.errors import ConfigError, DataError
from alignment.evaluation import Samples, evaluation, paired_rows, same_tokens
from alignment.lm_harness import check_tasks, run_tasks
from alignment.preparation import load_prompts, prepare, prepare_evaluation
from alignment.progress import PhaseLines
from alignment.prompts import read_prompts
from alignment.report import EVALUATION_KEYS
from alignment.types import Prompt, ScoredRollout
from flow_runs import SMOKE
from models.policy import load_policy


def scored(prompt: int, index: int, response: str, reward: float, reason: str = "length") -> ScoredRollout:
    return ScoredRollout(
        prompt_id=str(prompt), rollout_index=index, response=response, finish_reason=reason, reward=reward
    )  # type: ignore[arg-type]


def samples() -> tuple[Samples, Samples]:
    """Two samples of the base, one of the aligned policy, for four prompts."""
    texts = ["I'm sorry, but no", "a b c d e", "a a a a a", ""]
    base = [[scored(i, 0, text, 0.0), scored(i, 1, "a b", 1.0)] for i, text in enumerate(texts)]
    aligned = [[scored(i, 0, "a b c d f", r, "stop")] for i, r in enumerate((1.0, 1.0, -1.0, 0.0))]
    return Samples(base, [[0.0, 0.0]] * 4), Samples(aligned, [[0.5]] * 4)


def test_every_promised_number_is_measured() -> None:
    result = evaluation(*samples(), [0.5, 1.0, 1.5, 2.0])
    for path in EVALUATION_KEYS:
        found = result
        for part in path.split("."):
            found = found[part]
    assert result["prompts"] == 4
    assert result["win_rate"] == 2.5 / 4
    assert result["sign_test"] == {"wins": 2, "losses": 1, "ties": 1, "p_value": 1.0}
    assert result["judge_sign_test"] == {"wins": 4, "losses": 0, "ties": 0, "p_value": 2 / 16}
    assert result["judge_length_controlled_win_rate"] == 1.0
    assert 0 < result["length_controlled_win_rate"] < 1
    base, aligned = result["base"], result["aligned"]
    assert (base["truncated_fraction"], aligned["truncated_fraction"]) == (1.0, 0.0)
    assert (base["refusal_fraction"], aligned["refusal_fraction"]) == (0.25, 0.0)
    assert (base["repetition_4"], aligned["repetition_4"]) == (0.125, 0.0)  # a a a a twice in one of four texts
    assert aligned["self_bleu"] == pytest.approx(1.0)
    assert aligned["kl_to_base"] == 1.25


def test_without_kl_the_rest_is_as_before() -> None:
    result, without = evaluation(*samples(), [0.5] * 4), evaluation(*samples(), None)
    assert without["aligned"].pop("kl_to_base") is without["aligned"].pop("kl_to_base_ci95") is None
    del result["aligned"]["kl_to_base"], result["aligned"]["kl_to_base_ci95"]
    assert without == result
    assert {row["kl_to_base"] for row in paired_rows(*samples(), None)} == {None}


def test_policies_with_other_vocabularies_have_no_kl(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    folder = policy_folder("tiny", tmp_path)
    policy, other = (load_policy(folder, prompt_format="text") for _ in range(2))
    assert same_tokens(policy, other)
    other.reader.tokenizer.add_tokens([AddedToken("<new>")])
    assert not same_tokens(policy, other)
    padded = load_policy(folder, prompt_format="text")
    padded.model.resize_token_embeddings(264)
    assert not same_tokens(policy, padded)


def smoke(root: Path, *overrides: str) -> Config:
    return load_config(SMOKE, [f"run.root={root}", *overrides])


def texts(prompts: tuple[Prompt, ...]) -> set[str]:
    return {prompt.messages[0]["content"] for prompt in prompts}


def test_the_prompts_are_those_that_a_run_of_this_config_evaluates_on(tmp_path: Path) -> None:
    config, tiny = smoke(tmp_path), str(policy_folder("tiny", tmp_path / "cache"))
    prepare(config, tmp_path / "run", print)
    prepare_evaluation(config, tmp_path / "evaluation", [tiny, tiny], [], print)
    assert load_prompts(tmp_path / "evaluation", "evaluation") == load_prompts(tmp_path / "run", "evaluation")
    assert not (tmp_path / "evaluation" / "prompts" / "train.jsonl").exists()


def test_prompts_that_a_policy_has_seen_judge_it_no_more(tmp_path: Path) -> None:
    config, tiny = smoke(tmp_path), str(policy_folder("tiny", tmp_path / "cache"))
    prepare_evaluation(config, tmp_path / "all", [tiny], [], print)
    whole = load_prompts(tmp_path / "all", "evaluation")
    prepare_evaluation(config, tmp_path / "some", [tiny], whole[:5], print)
    assert load_prompts(tmp_path / "some", "evaluation") == whole[5:]
    listed = [json.loads(line) for line in (tmp_path / "some" / "excluded_prompts.jsonl").read_text().splitlines()]
    reasons = {line["id"]: line["reason"] for line in listed}
    assert reasons[whole[0].prompt_id] == f"same text as training or validation prompt {whole[0].prompt_id}"
    with pytest.raises(DataError, match=r"^1 of the evaluation's prompts are new .* set evaluation\.prompts"):
        prepare_evaluation(config, tmp_path / "none", [tiny], whole[1:], print)


def test_a_test_split_of_its_own_is_disjoint_from_all_other_prompts(tmp_path: Path) -> None:
    root = tmp_path / "root"
    prepare(smoke(root), tmp_path / "plain", print)
    validation = load_prompts(tmp_path / "plain", "validation")
    train = read_prompts("toy:prompts", root / "cache")
    mine = [f"a prompt of mine {i}" for i in range(20)]
    borrowed = [*texts(validation), train[0].messages[0]["content"]]
    source = tmp_path / "test.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in (*mine, *mine, *borrowed)))
    config = smoke(root, f"evaluation.prompts={source}", "evaluation.num_prompts=21")
    prepare(config, tmp_path / "run", print)
    chosen = load_prompts(tmp_path / "run", "evaluation")
    assert texts(chosen) == {*mine, borrowed[-1]} and len(chosen) == 21
    assert load_prompts(tmp_path / "run", "validation") == validation
    assert not texts(chosen) & (texts(validation) | texts(load_prompts(tmp_path / "run", "train")))
    with pytest.raises(ConfigError, match=r"evaluation\.num_prompts \(22\) must be <= the 21 distinct prompts of eval"):
        prepare(smoke(root, f"evaluation.prompts={source}", "evaluation.num_prompts=22"), tmp_path / "more", print)


def test_progress_counts_all_phases_together() -> None:
    now, stream = [100.0], io.StringIO()
    lines = PhaseLines(60, stream, lambda: now[0])
    base, aligned = lines.phase("evaluating base"), lines.phase("evaluating aligned")
    for done, second in ((10, 2.0), (20, 10.0), (25, 12.0), (40, 20.0)):
        now[0] = 100.0 + second
        base(done, 40)
    lines.note("a note\x1b[2J")
    now[0] = 131.0
    aligned(20, 20)
    assert stream.getvalue().splitlines() == [
        "[###.......] evaluating base 20/40 | 20 s left",
        "[######....] evaluating base 40/40 | 10 s left",
        "a note [2J",
        "[##########] evaluating aligned 20/20",
    ]


COLOURS = {"sky": 1, "grass": 0, "sea": 1, "leaf": 0, "frog": 0}
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "The {{{{thing}}}} is"
doc_to_choice: ["green", "blue"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def colours_task(folder: Path) -> str:
    data = folder / "colours.jsonl"
    data.write_text("".join(json.dumps({"thing": k, "answer": v}) + "\n" for k, v in COLOURS.items()))
    (folder / "colours.yaml").write_text(TASK.format(data=data))
    return str(folder / "colours.yaml")


def test_a_harness_task_gives_the_accuracy_that_the_logits_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="pip install -r requirements-lm-eval.txt")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    policy = load_policy(policy_folder("tiny", tmp_path), prompt_format="text")

    def log_probability(context: str, choice: str) -> float:
        prompt, answer = policy.reader.encode(context), policy.reader.encode(f" {choice}")
        with torch.no_grad():
            log_p = policy.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        return sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(answer))

    right = [
        (log_probability(f"The {thing} is", "blue") > log_probability(f"The {thing} is", "green")) == answer
        for thing, answer in COLOURS.items()
    ]
    task = colours_task(tmp_path)
    results = run_tasks(policy, [task], limit=None, batch_rows=2, seed=0)
    assert results == {"colours": {"acc": pytest.approx(sum(right) / len(right))}}
    limited = run_tasks(policy, [task], limit=2, batch_rows=2, seed=0)
    assert limited == {"colours": {"acc": pytest.approx(sum(right[:2]) / 2)}}
    with pytest.raises(DataError, match=r"evaluation\.lm_eval_tasks \(no_such_task\): .* need a hub"):
        run_tasks(policy, ["no_such_task"], limit=None, batch_rows=2, seed=0)


def test_tasks_that_cannot_be_run_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_tasks([])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"evaluation\.lm_eval_tasks \(a, b\) needs lm_eval.*requirements-lm-eval\.txt"
    ):
        check_tasks(["a", "b"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"there is no file missing\.yaml"):
        check_tasks(["hellaswag", "missing.yaml"])
    check_tasks(["hellaswag", colours_task(tmp_path)])
