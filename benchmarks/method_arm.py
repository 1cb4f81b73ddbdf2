"""One arm of `benchmarks.method`, in a process of its own: train by its rule, evaluate now and then.

The stages are the product's own functions; rewards come from the exported reward model in this process, which the
served one equals to 1e-5. Started by benchmarks.method; reports as JSON lines.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignment.atomic_files import write_json
from alignment.config import Config, parse_config
from alignment.embedded import policy_folder
from alignment.engine import learning_rate, start_ranks
from alignment.ensemble import Ensemble
from alignment.ensemble_stage import find_others
from alignment.evaluation import kl_to_base, sample_and_score
from alignment.mix_in import load_mix_in, mixed, prepare_mix_in
from alignment.preferences import conversation
from alignment.preparation import PromptSets, cache_folder, load_prompt_sets
from alignment.rollouts import generate, in_prompt_order
from alignment.rs_step import decide, step_prompts, training_sampling
from alignment.trained_policy import follow, policy_engine
from alignment.types import Rollout
from alignment.update import update
from alignment.worker import emit
from models.judge import Judge, load_judge
from models.policy import Policy, load_policy
from models.reward_model import load_reward_model, render, score_texts

POOL = 16
"""Responses of the base, besides the opponent, that the best-of-n curve picks from."""
EVALUATIONS = 4
"""Times that an arm is evaluated on its way, the end included."""


@dataclass(frozen=True)
class Scorer:
    """A reward model in this process, in the place of its server's client; `mean` and `std` standardise its output."""

    model: Any
    tokenizer: Any
    template: str
    max_tokens: int
    model_name: str = "in process"
    model_version: str = ""
    mean: float = 0.0
    std: float = 1.0
    _background: None = None

    def score(self, conversations: Sequence[Any]) -> list[float]:
        """The reward of each conversation, in order."""
        texts = [render(self.template, one) for one in conversations]
        rewards = score_texts(self.model, self.tokenizer, texts, max_tokens=self.max_tokens)
        return [(reward - self.mean) / self.std for reward in rewards]

    def _submit(self, pool: None, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """There is no background here: the call is made at once."""
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


@dataclass(frozen=True)
class World:
    """What every arm starts from. `scorer` measures all of them; rejection sampling selects by the `ensemble`."""

    config: Config
    base: Policy
    scorer: Scorer
    ensemble: Ensemble
    judge: Judge
    prompts: PromptSets
    demonstrations: Sequence[Rollout]

    @property
    def steps(self) -> int:
        """RS steps of an arm."""
        return self.config.total_steps(len(self.prompts.train))

    def policy(self) -> Policy:
        """The base, loaded anew to be trained."""
        return _policy(self.config)

    def measured(self, policy: Policy, who: str, samples_per_prompt: int = 1) -> dict[str, Any]:
        """Responses to the evaluation prompts: of each its id, rewards, judge's scores and KL to the base."""
        samples = sample_and_score(
            policy,
            self.prompts.evaluation,
            Ensemble((self.scorer,)),  # type: ignore[arg-type]
            self.judge,
            samples_per_prompt=samples_per_prompt,
            max_new_tokens=self.config.rollouts.max_new_tokens,
            batch_tokens=self.config.rollouts.batch_tokens,
            stream=f"{self.config.seed}/evaluation/{who}",
            on_progress=lambda done, total: None,
        )
        return {
            "prompts": [prompt.prompt_id for prompt in self.prompts.evaluation],
            "reward": [[r.reward for r in group] for group in samples.rollouts],
            "judge": samples.judged,
            "kl": [] if policy is self.base else kl_to_base(policy, self.base, samples.first()),
            "responses": [r.response for r in samples.first()],
        }


def main() -> None:
    """Train the arm, write what was measured to `--out`."""
    options = _options()
    config, folder = parse_config(Path(options.config).read_text()), Path(options.folder)
    world = _world(config, folder, Path(options.reward_model))
    if options.method == "base":
        points = [{"step": 0, **world.measured(world.base, "base", POOL + 1)}]
    else:
        train = rejection_sampling if options.method == "rejection_sampling" else _trl(options.method)
        points = list(train(world))
    write_json(Path(options.out), points)


def rejection_sampling(world: World) -> Iterator[dict[str, Any]]:
    """RS steps as a colocated worker does them, without Triton; measured `EVALUATIONS` times."""
    config, begun = world.config, time.monotonic()
    ranks = start_ranks(threads=config.resources.threads, gpu=config.resources.gpu > 0)
    policy, training, steps = world.policy(), config.training, world.steps
    engine = policy_engine(config, policy, policy_folder(config.policy.model, cache_folder(config)), None, 1)
    for step in range(1, steps + 1):
        engine.eval()
        prompts = step_prompts(config, world.prompts.train, step)
        batches = generate(
            policy,
            prompts,
            samples_per_prompt=config.rollouts.num_rollouts_per_prompt,
            sampling=training_sampling(config),
            batch_tokens=config.rollouts.batch_tokens,
            stream=f"{config.seed}/step-{step}",
            with_references=config.rollouts.references == "join",
        )
        rollouts = in_prompt_order([r for batch in batches for r in batch], prompts)
        scored = world.ensemble.compared(world.ensemble.score(rollouts))
        selected = [r for r, d in zip(scored, decide(config, scored), strict=True) if d.selected]
        update(
            engine,
            mixed(selected, world.demonstrations, config, step),
            training,
            ranks,
            lr=learning_rate(step, training, total_steps=steps),
            stream=f"{config.seed}/step-{step}",
        )
        follow(policy, engine)
        emit({"kind": "phase", "step": step, "reward": sum(r.reward for r in scored) / len(scored)})
        if step * EVALUATIONS // steps > (step - 1) * EVALUATIONS // steps:
            yield {"step": step, "seconds": time.monotonic() - begun, **world.measured(policy, "aligned")}


def _trl(method: Any) -> Any:
    def train(world: World) -> Iterator[dict[str, Any]]:
        from benchmarks.peers import trl_online

        config, begun = world.config, time.monotonic()
        policy = world.policy()
        steps = range(1, world.steps + 1)
        texts = [policy.reader.text(p) for step in steps for p in step_prompts(config, world.prompts.train, step)]

        def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
            return world.scorer.score(
                [conversation([{"role": "user", "content": p}], c) for p, c in zip(prompts, completions, strict=True)]
            )

        trl_online.train(policy, texts, reward, config, method)
        yield {"step": steps[-1], "seconds": time.monotonic() - begun, **world.measured(policy, "aligned")}

    return train


def _world(config: Config, folder: Path, weights: Path) -> World:
    torch.set_num_threads(config.resources.threads)
    model, tokenizer = load_reward_model(str(weights), require_head=True)
    device, reward = torch.device("cuda" if config.resources.gpu else "cpu"), config.reward
    scorer = Scorer(model.to(device), tokenizer, reward.template, reward.max_tokens)  # type: ignore[arg-type]
    others = [_exported(ref, device) for ref in find_others(config).get("members", [])]
    ensemble = Ensemble((scorer, *others), config.member_weights, config.reward_ensemble.combine)  # type: ignore[arg-type]
    judge, prompts = load_judge(folder / "judge"), load_prompt_sets(folder)
    return World(config, _policy(config), scorer, ensemble, judge, prompts, _demonstrations(config, folder))


def _exported(ref: Mapping[str, Any], device: torch.device) -> Scorer:
    """Another member, from its export."""
    version = Path(ref["repository"]) / ref["name"] / ref["version"]
    settings = json.loads((version / "settings.json").read_text())
    model, tokenizer = load_reward_model(str(version / "weights"), require_head=True)
    scale = {key: settings[key] for key in ("mean", "std")} if settings["output"] == "standardized" else {}
    template = (version / "template.jinja").read_bytes().decode()
    names = {"model_name": ref["name"], "model_version": ref["version"]}
    return Scorer(model.to(device), tokenizer, template, settings["max_tokens"], **names, **scale)  # type: ignore[arg-type]


def _demonstrations(config: Config, folder: Path) -> Sequence[Rollout]:
    """Those of the arm's SFT mix-in, written apart: other arms, which share the folder, may have others."""
    with tempfile.TemporaryDirectory() as own:
        shutil.copytree(folder / "prompts", Path(own) / "prompts")
        prepare_mix_in(config, Path(own), print)
        return load_mix_in(config, Path(own))


def _policy(config: Config) -> Policy:
    device = "cuda" if config.resources.gpu else "cpu"
    source = policy_folder(config.policy.model, cache_folder(config))
    return load_policy(source, prompt_format=config.policy.prompt_format, device=device, dtype=config.policy.dtype)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="one arm of benchmarks.method; started by it")
    parser.add_argument("--method", required=True, choices=("base", "rejection_sampling", "grpo", "rloo"))
    for name in ("folder", "config", "reward-model", "out"):
        parser.add_argument(f"--{name}", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
