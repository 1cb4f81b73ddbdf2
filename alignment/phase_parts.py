"""What several phases of the disaggregated executor do: sample by the run's policy, score, read what JSON carried."""

from collections.abc import Mapping, Sequence
from typing import Any

from alignment.config import Config
from alignment.run_folder import RunFolder
from alignment.task import claim_devices, served, tested_clients
from alignment.types import Prompt, RewardModelRef, Rollout, ScoredRollout

Plain = dict[str, Any]


def sample(
    config: Config,
    run: RunFolder,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    stream: str,
    *,
    with_references: bool = False,
) -> list[Rollout]:
    """Rollouts by the policy of the last checkpoint, or of the base, in the order of `prompts`."""
    import torch

    from alignment.policy_source import base_folder
    from alignment.rollout_engine import load_engine
    from alignment.rollouts import generate, in_prompt_order
    from alignment.rs_step import training_sampling
    from models.checkpoints import last_checkpoint
    from models.policy import load_policy

    claim_devices(config)
    torch.set_num_threads(config.resources.threads)
    checkpoint = last_checkpoint(run.checkpoints)
    source = checkpoint.uri if checkpoint else base_folder(config)
    policy = load_policy(
        source,
        prompt_format=config.policy.prompt_format,
        device="cuda" if config.resources.gpu else "cpu",
        dtype=config.policy.dtype,
    )
    batches = generate(
        policy,
        prompts,
        samples_per_prompt=samples_per_prompt,
        sampling=training_sampling(config),
        batch_tokens=config.rollouts.batch_tokens,
        stream=stream,
        with_references=with_references,
        engine=load_engine(config, source),
    )
    return in_prompt_order([r for batch in batches for r in batch], prompts)


def score(
    config: Config,
    run: RunFolder,
    reward_model_ref: Mapping[str, Any],
    rollouts: Sequence[Rollout],
    *,
    step: int | None = None,
) -> tuple[list[ScoredRollout], Plain, Plain | None]:
    """The rollouts with rewards, what the server says of its work, and what `reuse.scores` answered in its place.

    A local server lives as long as this call.

    Rollouts of RS step `step` are compared within their prompts, and take the scores that an attempt before stored.
    """
    from alignment.stored_scores import key, known, stored_scores
    from alignment.triton_metrics import ServerWatch

    reward = RewardModelRef(**reward_model_ref)
    with (
        served(config, run, reward) as server,
        tested_clients(config, run, server, reward, print) as ensemble,
        ServerWatch(server.url, reward.name, reward.version, server.metrics_url, print) as watch,
    ):
        stored = {} if step is None else stored_scores(run, ensemble, step)
        watch.begin()
        new = iter(ensemble.score([r for r in rollouts if key(r) not in stored]))
        scored = [known(ensemble, r, stored) if key(r) in stored else next(new) for r in rollouts]
        return scored if step is None else ensemble.compared(scored), watch.end(), ensemble.take_counts()


def reused(config: Config, run: RunFolder, prompts: Sequence[Prompt], step: int) -> list[ScoredRollout]:
    """The scored rollouts of RS step `step`, which reads `prompts`, from the run that `reuse.rollouts` names."""
    from alignment.policy_source import base_folder
    from alignment.reuse import reused_rollouts
    from models.policy import load_reader

    reader = load_reader(base_folder(config), prompt_format=config.policy.prompt_format)
    return reused_rollouts(run, prompts, reader, step)


def rollout(values: Mapping[str, Any]) -> Rollout:
    """A rollout as JSON carried it."""
    return Rollout(**_with_tuples(values))


def scored_rollout(values: Mapping[str, Any]) -> ScoredRollout:
    """A scored rollout as JSON carried it."""
    return ScoredRollout(**_with_tuples(values))


def _with_tuples(values: Mapping[str, Any]) -> Plain:
    """JSON has lists where the carriers have tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
