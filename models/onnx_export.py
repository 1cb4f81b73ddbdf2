"""A reward model as ONNX, for servers that run it through ONNX Runtime.

Encoders alone: a decoder reads its reward at the last token that differs from the padding id, which the server
chooses for each micro-batch and which a graph would hold as a constant.

Legend: B sequences, T tokens, A outputs.
"""

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from alignment.errors import ConfigError, ModelError

ONNX_FILE = "model.onnx"
PACKAGES = ("onnx", "onnxruntime")
TOLERANCE = 1e-4
OPSET = 17
SHAPES = ((1, 3), (3, 11))
"""B and T of the batches whose outputs are compared; the graph is traced at another shape."""


class _Logits(torch.nn.Module):
    """The head's outputs alone, as a graph's one output."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def check_onnx(config: PretrainedConfig) -> None:
    """Raises ConfigError naming `reward.runtime` for a decoder, or where a package is missing."""
    if _is_decoder(config):
        raise ConfigError(
            f"reward.runtime (onnxruntime) cannot serve {config.model_type}, a decoder: its reward is read at the last "
            "token that is not padding, and a graph holds the padding id as a constant. Set reward.runtime to torch"
        )
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"reward.runtime (onnxruntime) needs {' and '.join(missing)}: `pip install -r requirements-onnx.txt`, "
            "or set reward.runtime to torch"
        )


def write_onnx(model: PreTrainedModel, path: Path) -> None:
    """Write the model's graph in float32, with B and T free, and compare its outputs with the model's.

    Attention is traced in its plain form: on a CPU ONNX Runtime computes it faster than the fused one's graph.
    Raises ModelError where an output differs by more than 1e-4.
    """
    plain = copy.deepcopy(model).float().cpu()
    plain.set_attn_implementation("eager")
    logits = _Logits(plain).eval()
    with warnings.catch_warnings(), torch.inference_mode():
        # The tracer warns of each Python branch, and torch that a newer exporter exists, whose graphs are slower here.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            logits,
            _batch(plain, 2, 7),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes={name: {0: "B", 1: "T"} for name in ("input_ids", "attention_mask")},
            opset_version=OPSET,
            dynamo=False,
        )
    _compare(logits, path)


def _compare(logits: _Logits, path: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size, length in SHAPES:
        input_ids, mask = _batch(logits.model, size, length)
        with torch.inference_mode():
            expected = logits(input_ids, mask)
        (found,) = session.run(None, {"input_ids": input_ids.numpy(), "attention_mask": mask.numpy()})
        drift = (torch.from_numpy(found) - expected).abs().max().item()
        # Not "above": NaN must fail too.
        if not drift <= TOLERANCE:
            raise ModelError(
                f"reward.runtime (onnxruntime): outputs of {size} texts of {length} tokens differ by {drift:.2g} from "
                f"torch's, more than {TOLERANCE:g}: set reward.runtime to torch"
            )


def _batch(model: Any, size: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids spread over the vocabulary, each row one token shorter than the one before. Shape: both (B, T)."""
    vocabulary = model.get_input_embeddings().num_embeddings
    input_ids = (torch.arange(size * length).reshape(size, length) * 7919) % vocabulary
    mask = (torch.arange(length) < length - torch.arange(size)[:, None]).long()
    pad_id = model.config.get_text_config().pad_token_id
    return torch.where(mask == 1, input_ids, 0 if pad_id is None else pad_id), mask


def _is_decoder(config: PretrainedConfig) -> bool:
    """Whether transformers knows a causal LM, and no masked one, of this kind: BERT has both."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
