"""What an RS step costs beside NeMo-Aligner's way to make one.

    python -m benchmarks.rs_step [--only NAME …] [--prompts N] [--rounds N] [--threads N]

The default task's policy and reward model, each side's rewards from a real Triton: rollouts, their rewards, selection
and the update on what was kept. Selection and update are the same code on both sides, at a rate too small to move a
weight; how rollouts are generated and scored is each side's own. Two workloads:

    rs_step_vs_nemo_aligner        beginnings of reviews, 40 to 200 tokens, × 8 samples × 32 tokens
    rs_step_of_the_default_task    its own prompts of some ten words × 8 samples × 24 tokens
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config import Config, load_config
from alignment.config_sections import ResourcesSection
from alignment.types import Prompt, ScoredRollout
from benchmarks import reward_setup
from benchmarks.results import Result, noted, record, result, shown, speedups
from benchmarks.rounds import Note, interleaved
from benchmarks.update_setup import TRAINING, engine_for, start
from models.policy import Policy

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python -m benchmarks.rs_step"
LONG, SHORT = "rs_step_vs_nemo_aligner", "rs_step_of_the_default_task"
LONG_SETS = ("rollouts.max_new_tokens=32", "prompts.max_prompt_tokens=200", "reward.max_tokens=256")
"""A review's tokens are a few more to the reward model than to the policy."""


@dataclass(frozen=True)
class Step:
    """What both sides start from, and the engine that trains on what was kept."""

    config: Config
    policy: Policy
    prompts: Sequence[Prompt]
    engine: Any

    def train(self, scored: Sequence[ScoredRollout]) -> list[float]:
        """Select, update; returns nothing to compare, since the sides' samples differ."""
        from alignment.engine import Ranks
        from alignment.rs_step import decide
        from alignment.update import update

        selected = [r for r, d in zip(scored, decide(self.config, scored), strict=True) if d.selected]
        training = self.config.training
        update(self.engine, selected, training, Ranks(0, 1), lr=training.lr, stream="bench")
        return []


def compare(name: str, config: Config, rounds: int, note: Note) -> Result:
    """Seconds of NeMo-Aligner's way over ours, for the same prompts, samples and updates."""
    from alignment.reviews import review_prompts
    from benchmarks.peers.constant_padding import ConstantPaddingClient, served_with_padding
    from benchmarks.peers.nemo_rollouts import PROMPTS, scored_rollouts
    from models.policy import load_policy

    threads = config.resources.threads
    folder = start(Path("runs") / "cache", threads, note)
    local = reward_setup.default_reward_model(config.reward.max_tokens, threads)
    policy = load_policy(folder, prompt_format="text")
    count = config.rollouts.num_rollout_samples
    prompts = beginnings(policy, count) if name == LONG else review_prompts("imdb:prompts")[:count]
    step = Step(config, policy, prompts, engine_for(policy.model, config.training))
    with tempfile.TemporaryDirectory(prefix="rs-step-") as scratch:
        weights = reward_setup.export(local, Path(scratch) / "repository")
        log = Path(scratch) / "log"
        with (
            reward_setup.served(Path(scratch) / "repository", threads=threads, log=log) as server,
            reward_setup.ready_client(server) as client,
            served_with_padding(weights, threads=threads, log=log.with_name("padded.log")) as url,
        ):
            padded = ConstantPaddingClient(url, config.reward.max_tokens, local.model.config.pad_token_id)
            ways = {
                "ours": lambda: step.train(_scored(step, client)),
                "theirs": lambda: step.train(scored_rollouts(policy, prompts, config, padded, local.rows)),
            }
            seconds = interleaved(ways, rounds, note, title=name)
            padded.close()
    rule = config.rollouts
    against = (
        f"NeMo-Aligner's way, in transformers: one sample a prompt at a time, {PROMPTS} prompts a micro-batch, scored "
        f"in padded rows before the next ({len(prompts)} prompts x {rule.num_rollouts_per_prompt} samples x "
        f"{rule.max_new_tokens} tokens)"
    )
    ratios = speedups(seconds["theirs"], seconds["ours"])
    return result(name, ratios, target=3, against=against, command=COMMAND)


def beginnings(policy: Policy, count: int) -> list[Prompt]:
    """Beginnings of as many reviews, their lengths in the policy's tokens spread evenly."""
    from benchmarks.rollouts import LONGEST, SHORTEST
    from benchmarks.texts import whole_reviews

    made = []
    for i, review in enumerate(whole_reviews(count, min_words=LONGEST)):
        length = SHORTEST + i * (LONGEST - SHORTEST) // max(1, count - 1)
        ids = policy.reader.encode(review[0]["content"])[:length]
        made.append(Prompt(f"review-{i}", ({"role": "user", "content": policy.reader.decode([], ids)},)))
    return made


def _scored(step: Step, client: Any) -> list[ScoredRollout]:
    """Ours: a prompt's rewards are asked for while others generate."""
    from alignment.rollouts import generate, in_prompt_order
    from alignment.rs_step import training_sampling
    from alignment.scoring import score_in_background

    rule = step.config.rollouts
    pending = [
        score_in_background(client, batch)
        for batch in generate(
            step.policy,
            step.prompts,
            samples_per_prompt=rule.num_rollouts_per_prompt,
            sampling=training_sampling(step.config),
            batch_tokens=rule.batch_tokens,
            stream="bench",
        )
    ]
    return in_prompt_order([r for future in pending for r in future.result()], step.prompts)


def main() -> int:
    """Measure, record, print. 0 whatever the ratios are; 1 where one could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[LONG, SHORT], default=[LONG, SHORT])
    parser.add_argument("--prompts", type=int, default=16, help="prompts of the RS step")
    parser.add_argument("--rounds", type=int, default=3, help="ratios")
    parser.add_argument("--threads", type=int, default=ResourcesSection().threads, help="torch threads of both sides")
    options = parser.parse_args()
    return shown(lambda: compared(options))


def compared(options: argparse.Namespace) -> list[Result]:
    """The results, each recorded as soon as it is made. Raises AlignmentError."""
    sets = [f"rollouts.num_rollout_samples={options.prompts}", f"resources.threads={options.threads}"]
    sets += [*(f"training.{key}={value}" for key, value in TRAINING.items()), "training.kl_penalty=0"]
    results = []
    for name in options.only:
        config = load_config(ROOT / "configs" / "imdb_sentiment.yaml", [*sets, *(LONG_SETS if name == LONG else ())])
        made = [compare(name, config, options.rounds, noted())]
        record(made)
        results += made
    return results


if __name__ == "__main__":
    sys.exit(main())
