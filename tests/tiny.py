"""Tiny models with random weights, built in memory: what the unit tests of the torch code run on."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 61
EOS = 2


def tiny_llama(seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    """A two-layer grouped-query Llama whose distributions are far from uniform. float32, evaluation mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=EOS,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def random_rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Rows of random token ids that are no ending token."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
