"""The self-test of a reward server: what it lets pass, and what each fault is called."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.config import load_config
from alignment.errors import RewardRequestError, RewardServerError
from alignment.reward_selftest import PROBES, check_export, newly_made, self_test
from alignment.scoring import RewardClient
from alignment.task import check_scoring
from alignment.types import RewardModelRef
from models.reward_export import read_version
from reward_fixtures import ServedRewardModel, export_tiny

SMOKE = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"


class ClientStandIn:
    """Stands in for a client whose server scores each request by `rule`, which sees all of its conversations."""

    url, model_name, model_version = "gpu-7:8001", "reward_model", "3"

    def __init__(self, rule: Callable[[Sequence[Any]], list[float]]) -> None:
        self.rule, self.sent = rule, list[int]()

    def score(self, conversations: Sequence[Any]) -> list[float]:
        self.sent.append(len(conversations))
        return self.rule(conversations)


def verdict(rule: Callable[[Sequence[Any]], list[float]], version: str = "3") -> str:
    return self_test(cast(RewardClient, ClientStandIn(rule)), version)


def by_length(conversations: Sequence[Any]) -> list[float]:
    return [float(len(c[-1]["content"])) for c in conversations]


def test_the_probes_are_a_handful_of_different_lengths() -> None:
    lengths = by_length(PROBES)
    assert len(PROBES) == len(set(lengths)) == 5
    assert max(lengths) <= 64  # a token is a byte or more, and reward.max_tokens is 64 by default


def test_each_is_scored_alone_and_all_together_in_two_orders() -> None:
    client = ClientStandIn(by_length)
    assert self_test(cast(RewardClient, client), "3") == "alone, batched and reordered agree within 0e+00"
    assert client.sent == [1, 1, 1, 1, 1, 5, 5]


def test_small_differences_pass_and_larger_ones_do_not() -> None:
    """1e-4 is the limit for rewards of up to 1 in size, and 1e-4 of their size beyond."""

    def moved_by(gap: float, scale: float) -> Callable[[Sequence[Any]], list[float]]:
        return lambda conversations: [scale + (gap if len(conversations) > 1 else 0.0) for _ in conversations]

    assert verdict(moved_by(0.9e-4, 0.5)) == "alone, batched and reordered agree within 9e-05"
    assert verdict(moved_by(0.9e-2, 100.0)).endswith("9e-03")
    for gap, scale in ((1.1e-4, 0.5), (1.1e-2, 100.0)):
        with pytest.raises(RewardServerError, match=r"gets the reward .* alone and .* in one batch"):
            verdict(moved_by(gap, scale))


def test_a_score_that_depends_on_its_place_is_an_error() -> None:
    """In the order in which all are sent first, each gets its own; in the other, its neighbour's."""
    lengths = by_length(PROBES)

    def by_place(conversations: Sequence[Any]) -> list[float]:
        return lengths if len(conversations) > 1 else by_length(conversations)

    with pytest.raises(
        RewardServerError,
        match=r"the reward model reward_model version 3 at gpu-7:8001 failed its self-test: 'No' gets the reward "
        r"2\.0+ alone and 19\.0+ in reverse order; .*export it again",
    ):
        verdict(by_place)


def test_a_refused_probe_is_an_error_of_the_server() -> None:
    def refuse(_: Sequence[Any]) -> list[float]:
        raise RewardRequestError("cannot score conversation 0: the model's output is not finite")

    with pytest.raises(RewardServerError, match=r"version 3 at gpu-7:8001 .*not finite.*reward\.max_tokens"):
        verdict(refuse)


def test_another_version_is_an_error() -> None:
    with pytest.raises(RewardServerError, match=r"version 3 at gpu-7:8001 answers in the place of version 4.*serve"):
        verdict(by_length, version="4")


def test_the_real_server_passes(served_reward_model: ServedRewardModel) -> None:
    served = served_reward_model
    reward = read_version(served.repository, served.name, served.version)
    notes: list[str] = []
    for overrides in ([], [f"reward.url={served.url}"]):
        config = load_config(SMOKE, overrides)
        with RewardClient(served.url, served.name, served.version) as client:
            check_scoring(config, client, reward, notes.append)
    ours, external = notes
    assert ours.startswith(f"self-test of reward_model version 1 at {served.url}: its weights are the recorded ones (")
    assert reward.digest[:12] in ours
    assert external.startswith(
        f"self-test of reward_model version 1 at {served.url}: its weights, head included, are out"
    )
    for note in notes:
        gap = re.search(r"; alone, batched and reordered agree within (\S+)$", note)
        assert gap and float(gap[1]) <= 1e-5


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> RewardModelRef:
    repository = tmp_path_factory.mktemp("repository")
    return read_version(repository, "reward_model", export_tiny(repository))


def copied(reward: RewardModelRef, place: Path, **changes: str) -> RewardModelRef:
    """The export at another place, which a test may damage."""
    shutil.copytree(reward.repository, place / "repository")
    kept = {"name": reward.name, "version": reward.version, "digest": reward.digest, "accuracy": reward.accuracy}
    return RewardModelRef(**(kept | {"repository": str(place / "repository")} | changes))


def version_folder(reward: RewardModelRef) -> Path:
    return Path(reward.repository) / reward.name / reward.version


def test_an_export_as_it_was_recorded_passes(exported: RewardModelRef) -> None:
    assert check_export(exported) == f"its weights are the recorded ones (sha256 {exported.digest[:12]}…)"


def test_a_run_that_recorded_no_digest_is_told_so(exported: RewardModelRef) -> None:
    """It was begun with an external server."""
    found = check_export(RewardModelRef(exported.name, exported.version, "", exported.repository, None))
    assert found == f"its weights are whole (sha256 {exported.digest[:12]}…); which ones this run means is not recorded"


def test_changed_weights_are_an_error(exported: RewardModelRef, tmp_path: Path) -> None:
    reward = copied(exported, tmp_path)
    file = version_folder(reward) / "weights" / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.bias"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        RewardServerError, match=r"version 1 of the local server, in .* is not fit .*damaged or were cha"
    ):
        check_export(reward)


def test_another_digest_than_the_recorded_is_an_error(exported: RewardModelRef, tmp_path: Path) -> None:
    with pytest.raises(RewardServerError, match=rf"has the digest {exported.digest}, and this run scores with 00ff"):
        check_export(copied(exported, tmp_path, digest="00ff"))
    with pytest.raises(RewardServerError, match=r"not fit to score: .*does not exist; versions there: 1"):
        check_export(copied(exported, tmp_path / "other", version="2"))


def test_a_head_that_would_be_drawn_at_random_is_an_error(exported: RewardModelRef, tmp_path: Path) -> None:
    """The card's digest is that of the weights without a head, so that nothing but the head gives it away."""
    reward = copied(exported, tmp_path)
    folder = version_folder(reward)
    file = folder / "weights" / "model.safetensors"
    assert newly_made(folder / "weights") == []
    rest = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("classifier")}
    save_file(rest, file, metadata={"format": "pt"})
    state = torch.get_rng_state()
    assert newly_made(folder / "weights") == ["classifier.bias", "classifier.weight"]
    assert torch.equal(torch.get_rng_state(), state)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | {"digest": digest}))
    headless = RewardModelRef(reward.name, reward.version, digest, reward.repository, None)
    with pytest.raises(RewardServerError, match=r"lacks the weights classifier\.bias, classifier\.weight, and random"):
        check_export(headless)
