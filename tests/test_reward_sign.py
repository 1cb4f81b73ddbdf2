"""The whole loop follows the reward: with its negative, served as another version, the gain changes sign."""

import json

import pytest
import torch

from alignment.statistics import mean_difference
from flow_runs import Place
from models.reward_export import Serving, export_version, read_version
from models.reward_model import load_reward_model, render, score_texts

SETTINGS = {
    "rollouts__num_rollout_samples": 32,
    "rollouts__num_rollouts_per_prompt": 8,
    "training__lr": 0.01,
    "training__global_batch_size": 32,
    "training__micro_batch_size": 32,
    "loop__max_steps": 8,
    "loop__steps_per_iteration": 8,
    "loop__val_check_interval": 8,
    "loop__save_interval": 8,
    "evaluation__num_prompts": 48,
    "evaluation__best_of_n": 1,
}


def negated(repository):
    """Export version 1 once more with its head's sign turned."""
    folder = repository / "reward_model" / "1"
    model, tokenizer = load_reward_model(str(folder / "weights"), require_head=True)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.neg_()
    settings = json.loads((folder / "settings.json").read_text())
    template = (folder / "template.jinja").read_text()
    card = {"accuracy": None, "recipe_digest": "negated"}
    serving = Serving(template=template, **settings)
    return export_version(
        model, tokenizer, repository=repository, name="reward_model", serving=serving, card=card
    ).version


def gain_by_version_1(repository, folder):
    """Gain of the run's aligned responses over the base's, scored in process by version 1."""
    version = read_version(repository, "reward_model", "1")
    weights = repository / "reward_model" / version.version
    model, tokenizer = load_reward_model(str(weights / "weights"), require_head=True)
    template = (weights / "template.jinja").read_text()
    max_tokens = json.loads((weights / "settings.json").read_text())["max_tokens"]
    rows = json.loads((folder / "evaluation.json").read_text())

    def scores(side):
        texts = [
            render(template, [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r[side]}])
            for r in rows
        ]
        return score_texts(model, tokenizer, texts, max_tokens=max_tokens)

    return mean_difference(scores("aligned_response"), scores("base_response"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("sign"))


@pytest.mark.slow
def test_the_negative_of_the_reward_turns_the_gain(place):
    upward = place.run("run", **SETTINGS)
    repository = place.root / "triton_repo"
    gain = gain_by_version_1(repository, upward.folder)
    # The report's gain is the one of version 1, scored through Triton.
    assert upward.report["evaluation"]["reward_gain"] == pytest.approx(gain.value, abs=1e-3)
    assert gain.ci95[0] > 0

    version = negated(repository)
    downward = place.run("run", **SETTINGS, reward__version=version)
    assert downward.report["reward_model"]["version"] == version
    assert gain_by_version_1(repository, downward.folder).ci95[1] < 0
