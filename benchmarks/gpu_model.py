"""A policy with random weights, built from sizes alone: what the benchmark on a GPU runs on, without a hub."""

from collections.abc import Mapping
from pathlib import Path

HALF_BILLION = {
    "vocab_size": 49152,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
"""A Llama of 0.56 billion parameters, 50 million of which are the embedding: heads of 64, four queries to a key."""
TINY = HALF_BILLION | {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MARK = 16.0
"""What channel 0 of every embedding holds: some ten times what the layers put on top."""


def write_policy(sizes: Mapping[str, int], folder: Path, *, device: str, dtype: str, undrawn: int) -> Path:
    """A Llama in `folder` as transformers reads it, without a tokenizer. The token `undrawn` is never drawn from it.

    An ending token that came by chance would make ways of sampling differ in their work. Its logit is far below zero
    by a channel that says the same at every place, and that no other token's logit looks at.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = MARK
        head = model.get_output_embeddings().weight
        head[:, 0] = 0.0
        head[undrawn] = 0.0
        head[undrawn, 0] = -MARK
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
