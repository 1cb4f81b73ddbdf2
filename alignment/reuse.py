"""Training on another run's rollouts: `--set reuse.rollouts=RUN` selects anew from what RUN has stored.

RS step k takes the rollouts of RUN's step k with their scores, selects by this run's rule and updates; nothing is
generated, nothing is sent to the reward server. Validation and evaluation sample and score as in any run.

What drew and scored the rollouts must be this run's own: seed, policy, prompts, reward model and judge, and the
`rollouts` section, as checkpoints must agree that go on from each other. So the prompts are the same, too, and two runs
that share their rollouts are comparable prompt by prompt. Selection, training and the number of steps are free.

**On what policy.** RUN's policy drew the rollouts. In step 1 that is the base, which is this run's policy too; from
step 2 on the two policies differ as far as their selections do, and the training is off-policy. Nothing corrects for
it: that is the method, and step records, manifests and the report say whose rollouts they are.

    reused/step-*.parquet   RUN's files, hard links where the disk allows it: the run is complete by itself
    rollouts/step-*.parquet the same rollouts with this run's decisions
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignment.atomic_files import disk_errors, write_json
from alignment.config import Config, parse_config
from alignment.continuation import check_version, differences, find_run_named, link, link_tree, task_of
from alignment.ensemble import by_model
from alignment.errors import ConfigError, DataError
from alignment.preparation import NAMES, total_steps
from alignment.rollout_table import read_rows
from alignment.run_folder import RunFolder
from alignment.types import Prompt, ScoredRollout

if TYPE_CHECKING:
    from models.policy import PromptReader

SAMPLERS = ("batch_tokens", "engine", "vllm_tensor_parallel")
"""Keys of `rollouts` that say what samples and how much at a time, not from which distribution."""
NEEDED = ("response_ids", "reward_model", "reward_model_version")
"""Columns that not all rollouts have had."""


def find_reused(config: Config) -> str | None:
    """The run that `reuse.rollouts` names; None without. Raises ConfigError where there is none, StorageError."""
    return find_run_named("reuse.rollouts", config.reuse.rollouts, config.run.root)


def adopt_rollouts(config: Config, source: RunFolder, run: RunFolder) -> None:
    """Fill a new run's folder with the prompts, scorers and rollouts of `source`; once, however often.

    Raises ConfigError where this run cannot train on them, DataError for rollouts that cannot be used.
    """
    if run.scorers.exists():  # written last: a first step that is done again must not undo what came after it
        return
    scorers = _check_fits(config, source)
    total = total_steps(config, source.path)
    _check_rollouts(source, total, scorers)
    with disk_errors(run.path):
        for name in NAMES:
            link(source.path / "prompts" / f"{name}.jsonl", run.path / "prompts" / f"{name}.jsonl")
        link(source.path / "excluded_prompts.jsonl", run.path / "excluded_prompts.jsonl")
        link_tree(source.path / "judge", run.path / "judge")
        for step in range(1, total + 1):
            link(source.rollouts_file(step), run.reused_file(step))
    scorers["judge"]["uri"] = run.uri_of(run.path / "judge")
    write_json(run.scorers, scorers)


def reused_rollouts(
    run: RunFolder, prompts: Sequence[Prompt], reader: "PromptReader", step: int
) -> list[ScoredRollout]:
    """The scored rollouts of RS step `step`, which reads `prompts`; those whose shard was lost have none.

    They have no `log_probs`: another policy than this run's drew them. Raises DataError where they are not those of
    `prompts`.
    """
    path = run.reused_file(step)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    texts = {prompt.prompt_id: reader.text(prompt) for prompt in prompts}
    ids = {prompt_id: tuple(reader.encode(text)) for prompt_id, text in texts.items()}
    scored = []
    for row in read_rows(path):
        prompt_id = row["prompt_id"]
        if texts.get(prompt_id) != row["prompt"]:
            raise DataError(
                f"{path} has rollouts of the prompt {prompt_id} ({row['prompt'][:40]!r}), which RS step {step} of this "
                "run does not read: it was not written by the run that reuse.rollouts names, or changed since"
            )
        scored.append(_rollout(row, by_id[prompt_id], ids[prompt_id]))
    return scored


def _rollout(row: Mapping[str, Any], prompt: Prompt, prompt_ids: tuple[int, ...]) -> ScoredRollout:
    return ScoredRollout(
        **{key: row[key] for key in ("prompt_id", "rollout_index", "response", "finish_reason", "prompt", "reward")},
        **{key: row[key] for key in ("reward_model", "reward_model_version")},
        member_rewards=by_model(row, "member_rewards"),
        shadow_rewards=by_model(row, "shadow_rewards"),
        messages=prompt.messages,
        prompt_ids=prompt_ids,
        response_ids=tuple(row["response_ids"]),
        is_reference=row["log_prob"] is None,  # of what a policy drew it is known
    )


def drawn_by(config: Config) -> dict[str, Any]:
    """The keys, as dotted paths, that a run has in common with the run whose rollouts it trains on."""
    rollouts = config.rollouts.model_dump(mode="json", exclude=set(SAMPLERS))
    return {
        **{key: value for key, value in task_of(config).items() if not key.startswith("training.")},
        **{f"rollouts.{key}": value for key, value in rollouts.items()},
    }


def _check_fits(config: Config, source: RunFolder) -> dict[str, Any]:
    """The source's scorers. Raises ConfigError where this run's config does not go with its rollouts."""
    name = f"reuse.rollouts ({source.uri})"
    theirs = parse_config(source.config.read_text())
    if theirs.reuse.rollouts is not None:
        raise ConfigError(
            f"{name} has its rollouts from {theirs.reuse.rollouts}: set reuse.rollouts to that, whose policy drew them"
        )
    different = differences(drawn_by(theirs), drawn_by(config))
    if different:
        raise ConfigError(
            f"{name} was drawn or scored otherwise: {', '.join(different)}. Give these keys its values, best by "
            "--config config with its config.json, or begin a run that draws its own"
        )
    available = _steps_of(source)
    if not available:
        raise ConfigError(f"{name} has no rollouts yet: let that run go on first (`resume`), or name another")
    total = total_steps(config, source.path)
    if available < total:
        raise ConfigError(
            f"{name} has rollouts of {available} RS steps, and this run is to have {total}: set loop.max_steps="
            f"{available}, or let that run go on first (`resume`)"
        )
    scorers: dict[str, Any] = json.loads(source.scorers.read_text())
    ref = scorers["reward_model"]
    check_version(config, ref["version"], name)
    if not ref["repository"] and config.reward.url is None:
        raise ConfigError(
            f"{name} was scored by an external server, and validation and evaluation have to score with the same "
            "model: set reward.url"
        )
    return scorers


def _steps_of(source: RunFolder) -> int:
    """RS steps, from the first, whose rollouts a run has; none before it has scorers."""
    step = 0
    while source.scorers.exists() and source.rollouts_file(step + 1).is_file():
        step += 1
    return step


def _check_rollouts(source: RunFolder, total: int, scorers: Mapping[str, Any]) -> None:
    """Raise DataError for rollouts that lack a column, ConfigError where another model scored them."""
    import pyarrow.parquet as parquet

    members = [scorers["reward_model"], *scorers.get("members", [])]
    expected = tuple("+".join(ref[key] for ref in members) for key in ("name", "version"))
    for step in range(1, total + 1):
        path = source.rollouts_file(step)
        lacking = [column for column in NEEDED if column not in parquet.read_schema(path).names]
        if lacking:
            raise DataError(
                f"{path} lacks {', '.join(lacking)}, which earlier releases did not store: its responses cannot be "
                "trained on. Draw them again, by a new run of that config"
            )
        models = parquet.read_table(path, columns=["reward_model", "reward_model_version"])
        for name, version in (row.values() for row in models.group_by(models.column_names).aggregate([]).to_pylist()):
            if (name, version) != expected:
                raise ConfigError(
                    f"reuse.rollouts ({source.uri}): RS step {step} was scored by {name} version {version}, and this "
                    f"run would report {expected[0]} version {expected[1]}, which {source.scorers} names: name another "
                    f"run, or set loop.max_steps to less than {step}"
                )
