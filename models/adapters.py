"""What of a model is trained: all of it, or LoRA adapters and a head; as tensors that can be saved and put back.

LoRA (Hu et al. 2021, arXiv 2106.09685) through the library peft, on all linear layers; a reward model's head is trained
whole, a causal LM's stays as it is.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.errors import CheckpointError, ConfigError


def add_lora(
    model: PreTrainedModel, *, task: Literal["SEQ_CLS", "CAUSAL_LM"], rank: int, alpha: int, seed: int, section: str
) -> Any:
    """The model with adapters drawn from `seed`, all else frozen but a classifier's head.

    Raises ConfigError naming the config's `section`.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(task_type=task, r=rank, lora_alpha=alpha, target_modules="all-linear")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(model, settings)
    except (TypeError, ValueError) as error:  # peft's, for a model that it cannot wrap
        raise ConfigError(
            f"{section}.lora_rank ({rank}): {error}; set {section}.lora_rank=0 to train all weights"
        ) from error


def merge_lora(model: Any) -> PreTrainedModel:
    """The plain model with its adapters added to the weights."""
    merged: PreTrainedModel = model.merge_and_unload()
    return merged


def causal_lm(model: Any) -> Any:
    """The causal LM that adapters were put into, which calls them; the model itself without."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def copy_weights(trained: nn.Module, policy: nn.Module) -> None:
    """Put the weights of a policy under training, its adapters added to them, into a plain one of its architecture.

    Under ZeRO-3 all ranks must call it: each parameter is gathered.
    """
    modules = dict(causal_lm(trained).named_modules())
    for name, parameter in policy.named_parameters():
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        with _whole(list(module.parameters(recurse=hasattr(module, "get_delta_weight")))):
            if not hasattr(module, "get_delta_weight"):
                parameter.copy_(getattr(module, leaf))
            elif leaf == "weight":
                parameter.copy_(module.base_layer.weight + module.get_delta_weight("default"))
            else:
                parameter.copy_(getattr(module.base_layer, leaf))


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters by name. Under ZeRO-3 all ranks must call it: each parameter is gathered."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with _whole([parameter]):
                tensors[name] = parameter.detach().cpu().clone()
    return tensors


def load_trainable(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `trainable_tensors` gave, before an engine is built. Raises CheckpointError."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != tensors.keys():
        odd = sorted(parameters.keys() ^ tensors.keys())
        raise CheckpointError(f"the checkpoint's weights are not this model's: {', '.join(odd[:3])} …")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise CheckpointError(
                    f"{name} has the shape {tuple(tensors[name].shape)} in the checkpoint, "
                    f"{tuple(parameter.shape)} in the model"
                )
            parameter.copy_(tensors[name])


def _whole(parameters: Sequence[nn.Parameter]) -> Any:
    """A context in which parameters that ZeRO-3 has sharded are whole on every rank."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
