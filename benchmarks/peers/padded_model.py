"""Triton's side of the constant-padding peer: token ids of one fixed length in, one reward each out.

Runs inside tritonserver, beside `weights/`, and so imports nothing of the repository.
"""

import os

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from transformers import AutoModelForSequenceClassification


class TritonPythonModel:
    """The class that Triton's python backend looks for."""

    def initialize(self, args):
        """Load the weights that stand beside this file."""
        weights = os.path.join(args["model_repository"], args["model_version"], "weights")
        self.model = AutoModelForSequenceClassification.from_pretrained(
            weights, dtype=torch.float32, use_safetensors=True, local_files_only=True
        ).eval()

    def execute(self, requests):
        """One forward pass per request: its sender has batched and padded it."""
        responses = []
        for request in requests:
            tokens = pb_utils.get_input_tensor_by_name(request, "tokens").as_numpy()
            lengths = pb_utils.get_input_tensor_by_name(request, "sequence_lengths").as_numpy().reshape(-1)
            rewards = padded_rewards(self.model, tokens, lengths)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("rewards", rewards.reshape(-1, 1))]))
        return responses


def padded_rewards(model, tokens, lengths):
    """Rewards of right-padded rows. Shapes: tokens (B, T) and lengths (B,) int64, returns (B,) float32."""
    mask = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int64)
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).logits
    return logits.squeeze(-1).float().numpy()
