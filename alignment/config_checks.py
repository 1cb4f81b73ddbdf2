"""Checks of the config that need two keys; each message names both and the remedy.

All raise ValueError, which `alignment.config` makes a ConfigError, or ConfigError itself.
"""

import re
from typing import TYPE_CHECKING

from alignment.config_kubernetes import check_kubernetes
from alignment.config_promotion import check_promotion
from alignment.config_slurm import check_slurm
from alignment.config_training import RewardTrainingSection, SftSection, TrainingSection

if TYPE_CHECKING:
    from alignment.config import Config


ADDRESS = r"(\[[0-9a-fA-F:]+\]|[^/:\s]+):\d+|env:[A-Za-z_][A-Za-z0-9_]*"


def check_config(config: "Config") -> None:
    """Every check across keys, the first that fails."""
    sel, roll = config.selection, config.rollouts
    if sel.strategy.endswith("per_prompt") and sel.top_n_rollouts > roll.num_rollouts_per_prompt:
        raise ValueError(
            f"selection.top_n_rollouts ({sel.top_n_rollouts}) must be <= "
            f"rollouts.num_rollouts_per_prompt ({roll.num_rollouts_per_prompt}): "
            "lower the first or raise the second"
        )
    if sel.strategy.endswith("overall") and sel.top_k is None:
        raise ValueError(f"selection.strategy ({sel.strategy}) needs selection.top_k: set it to a number >= 1")
    if sel.strategy.endswith("per_prompt") and sel.top_k is not None:
        raise ValueError(
            f"selection.top_k ({sel.top_k}) is read by the *_overall strategies only: "
            f"unset it, or use selection.top_n_rollouts with {sel.strategy}"
        )
    if roll.min_new_tokens > roll.max_new_tokens:
        raise ValueError(
            f"rollouts.min_new_tokens ({roll.min_new_tokens}) must be <= rollouts.max_new_tokens "
            f"({roll.max_new_tokens}): lower the first or raise the second"
        )
    if 0 < roll.temperature < 0.01:
        raise ValueError(
            f"rollouts.temperature ({roll.temperature}) must be 0 or >= 0.01: logits over less are no longer "
            "finite; 0 takes the likeliest token"
        )
    longest = config.prompts.max_prompt_tokens + roll.max_new_tokens
    if roll.batch_tokens < longest:
        raise ValueError(
            f"rollouts.batch_tokens ({roll.batch_tokens}) must be >= prompts.max_prompt_tokens + "
            f"rollouts.max_new_tokens ({longest}): a prompt and a response of it must fit"
        )
    for section in (config.training, config.reward_training, config.sft):
        _check_training(config, section)
    _check_offloading(config)
    config.training.check_schedule(config.loop.max_steps)
    if config.sft.max_steps is not None:
        config.sft.check_schedule(config.sft.max_steps)
    _check_engine(config)
    _check_reuse(config)
    _check_reward_training(config)
    _check_reward_ensemble(config)
    _check_sft(config)
    _check_phases(config)
    check_promotion(config.promotion, config.training)
    check_slurm(config)
    check_kubernetes(config)
    if config.reward.name == "policy":
        raise ValueError(
            "reward.name (policy) is what the registry calls the policies of runs: give the reward model another name"
        )
    if config.reward.url is not None and not re.fullmatch(ADDRESS, config.reward.url):
        raise ValueError(
            f"reward.url ({config.reward.url}) must be host:port of Triton's gRPC endpoint, or env:NAME of an "
            "environment variable that holds it"
        )


def _check_training(config: "Config", section: TrainingSection | RewardTrainingSection | SftSection) -> None:
    name = section.key
    if section.min_lr > section.lr:
        raise ValueError(f"{name}.min_lr ({section.min_lr}) must be <= {name}.lr ({section.lr})")
    if section.constant_steps and section.lr_schedule == "constant":
        raise ValueError(
            f"{name}.constant_steps ({section.constant_steps}) end a linear or cosine schedule, and "
            f"{name}.lr_schedule is constant: set {name}.constant_steps=0"
        )
    own_phase = section is config.training and config.loop.executor == "disaggregated"
    key, gpu = "resources.gpu", config.resources.gpu
    if own_phase:
        key, gpu = "phases.update.gpu", config.in_phase("update").resources.gpu
    if section.offload_optimizer and not (gpu and section.zero_stage):
        raise ValueError(
            f"{name}.offload_optimizer needs GPUs, whose memory it spares, and DeepSpeed's ZeRO: set "
            f"{key} >= 1 (now {gpu}) and {name}.zero_stage >= 1 (now {section.zero_stage})"
        )


def _check_offloading(config: "Config") -> None:
    own = config.training
    if own.offload_during_rollouts and config.loop.executor == "disaggregated":
        raise ValueError(
            "training.offload_during_rollouts has nothing to move with loop.executor=disaggregated, whose rollouts and "
            "updates are processes of their own: leave it false, or set loop.executor=colocated"
        )
    if own.offload_during_rollouts and not config.resources.gpu:
        raise ValueError(
            "training.offload_during_rollouts spares a GPU's memory, and on a CPU the state would move from one place "
            "of the host to another: set resources.gpu >= 1 (now 0), or leave it false"
        )
    if own.offload_during_rollouts and own.offload_optimizer:
        raise ValueError(
            "training.offload_during_rollouts has nothing to move where training.offload_optimizer keeps AdamW's state "
            "on the host all the time: unset one of them"
        )


def _check_engine(config: "Config") -> None:
    own = config.rollouts
    if own.engine == "in_process" and own.vllm_tensor_parallel > 1:
        raise ValueError(
            f"rollouts.vllm_tensor_parallel ({own.vllm_tensor_parallel}) is read by rollouts.engine=vllm only: "
            "set that, or leave it 1"
        )
    if own.vllm_tensor_parallel > 1 and (not config.resources.gpu or config.resources.gpu % own.vllm_tensor_parallel):
        raise ValueError(
            f"rollouts.vllm_tensor_parallel ({own.vllm_tensor_parallel}) must divide resources.gpu "
            f"({config.resources.gpu}), a worker each: change one of them, or leave the first 1"
        )
    if own.engine == "vllm" and own.temperature and not 0.01 <= own.temperature <= 2:
        raise ValueError(
            f"rollouts.temperature ({own.temperature}) must be 0 or from 0.01 to 2 for rollouts.engine=vllm, which "
            "knows no others: change it, or set rollouts.engine=in_process"
        )
    if own.engine == "vllm" and own.stop and own.min_new_tokens:
        raise ValueError(
            f"rollouts.stop and rollouts.min_new_tokens ({own.min_new_tokens}) do not go together with "
            "rollouts.engine=vllm, which looks for no stop string before the least length: unset one of them, or "
            "set rollouts.engine=in_process"
        )


def _check_reuse(config: "Config") -> None:
    own = config.reuse
    if own.rollouts is not None and config.resume.from_ is not None:
        raise ValueError(
            f"reuse.rollouts ({own.rollouts}) begins at the base, and resume.from ({config.resume.from_}) goes on from "
            "a checkpoint: set one of them"
        )
    if own.scores and config.reward.url is not None:
        raise ValueError(
            f"reuse.scores keeps scores by the reward model's digest, which an external server (reward.url, "
            f"{config.reward.url}) does not tell: set it to false, or unset reward.url"
        )


def _check_reward_ensemble(config: "Config") -> None:
    own, name = config.reward_ensemble, config.reward.name
    if own.members and (name not in own.members or len(own.members) < 2):
        raise ValueError(
            f"reward_ensemble.members ({', '.join(own.members)}) must hold reward.name ({name}), without a "
            "version, and at least one more: add them, or leave it empty"
        )
    if own.combine == "vote" and not own.members:
        raise ValueError("reward_ensemble.combine (vote) needs models that vote: set reward_ensemble.members")
    for member, weight in own.members.items():
        if weight == 0 or (weight < 0 and own.combine == "vote"):
            raise ValueError(
                f"the weight of {member} in reward_ensemble.members ({weight:g}) must be "
                f"{'above 0 in a vote' if own.combine == 'vote' else 'other than 0'}: change it, or name the model "
                "in reward_ensemble.shadows"
            )
    models = [name, *(m for m in own.members if m != name), *own.shadows]
    twice = [m for i, m in enumerate(models) if m in models[:i]]
    if twice:
        raise ValueError(
            f"reward_ensemble.shadows names {twice[0]}, which scores already: take it out, or name another version"
        )


def _check_dtype_of_phases(config: "Config") -> None:
    gpus = {name: config.in_phase(name).resources.gpu for name in ("rollouts", "update", "validation")}
    if config.policy.dtype == "auto" and any(gpus.values()) and not all(gpus.values()):
        asked = ", ".join(f"phases.{name}.gpu={count}" for name, count in gpus.items())
        raise ValueError(
            f"policy.dtype (auto) is bfloat16 on GPUs and float32 without, and the phases of an RS step have both "
            f"({asked}; null means resources.gpu): set policy.dtype to one of the two, or give all three GPUs or none"
        )


def _check_phases(config: "Config") -> None:
    own, loop = config.phases, config.loop
    if loop.executor == "disaggregated" and loop.steps_per_iteration > 1:
        raise ValueError(
            f"loop.executor (disaggregated) does one RS step an iteration: set loop.steps_per_iteration=1 (now "
            f"{loop.steps_per_iteration}), or loop.executor=colocated"
        )
    if loop.executor == "disaggregated" and config.rollouts.vllm_tensor_parallel > 1:
        raise ValueError(
            f"rollouts.vllm_tensor_parallel ({config.rollouts.vllm_tensor_parallel}) does not go with "
            "loop.executor=disaggregated, whose shards sample in one process each: set it to 1, or "
            "loop.executor=colocated"
        )
    if own.shards > config.rollouts.num_rollout_samples:
        raise ValueError(
            f"phases.shards ({own.shards}) must be <= rollouts.num_rollout_samples "
            f"({config.rollouts.num_rollout_samples}), the prompts that are spread over them: lower the first or raise "
            "the second"
        )
    if own.update_nodes > 1 and config.run.root.startswith("s3://"):
        raise ValueError(
            f"phases.update_nodes ({own.update_nodes}) with run.root ({config.run.root}): the nodes of an update write "
            "one checkpoint together, but under s3:// each has a copy of its own. Set phases.update_nodes=1, or "
            "run.root to a folder that all nodes see"
        )
    _check_dtype_of_phases(config)
    if own.max_lost_shards >= own.shards:
        raise ValueError(
            f"phases.max_lost_shards ({own.max_lost_shards}) must be < phases.shards ({own.shards}): a step needs "
            "rollouts of one at least; lower the first or raise the second"
        )


def _check_sft(config: "Config") -> None:
    own = config.sft
    if own.validation and own.validation_share:
        raise ValueError(
            f"sft.validation ({own.validation}) and sft.validation_share ({own.validation_share}) both choose the "
            "checkpoint: set one of them"
        )
    if own.chat_template is not None and config.policy.prompt_format == "text":
        raise ValueError(
            "sft.chat_template is given, and policy.prompt_format is text, which reads none: set "
            "policy.prompt_format=chat"
        )


def _check_reward_training(config: "Config") -> None:
    own = config.reward_training
    if own.validation_share + own.test_share >= 1:
        raise ValueError(
            f"reward_training.validation_share ({own.validation_share}) + reward_training.test_share "
            f"({own.test_share}) must be < 1: the rest is what is trained on"
        )
    if own.stop_after is not None and not (own.validation_share or own.validation):
        raise ValueError(
            f"reward_training.stop_after ({own.stop_after}) needs a validation set: set "
            "reward_training.validation_share above 0, or reward_training.validation"
        )
    if own.loss == "regression" and own.validation:
        raise ValueError(
            f"reward_training.validation ({', '.join(own.validation)}) names pairs, and reward_training.loss "
            "(regression) is validated on ratings: set reward_training.validation_share instead"
        )
    if config.reward.output == "standardized" and not (own.held_out or own.test_share):
        raise ValueError(
            "reward.output (standardized) needs rewards that were measured: set reward_training.held_out or "
            "reward_training.test_share"
        )
    if (own.loss == "regression") != bool(own.attributes):
        raise ValueError(
            f"reward_training.attributes ({', '.join(own.attributes) or 'none'}) name the ratings that regression "
            f"learns, and reward_training.loss is {own.loss}: set both or neither"
        )
    if own.merge_weights and len(own.merge_weights) != len(own.attributes):
        raise ValueError(
            f"reward_training.merge_weights has {len(own.merge_weights)} numbers for "
            f"{len(own.attributes)} reward_training.attributes: give one each"
        )
