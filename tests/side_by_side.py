"""All responses of some prompts in the order of the prompts, as most tests want them; how rounding shows in them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from models.batching import TokenIds, response_batch, response_logits
from models.decoding import Decode, respond
from models.sampling import Sample, Sampling
from tiny import EOS


def sample(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    uniforms: Tensor,
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    decode: Decode | None = None,
) -> list[list[Sample]]:
    """What `respond` gives, with room for all rows at once."""
    room = uniforms.shape[1] * len(prompts) * (max(map(len, prompts)) + sampling.max_new_tokens)
    found: dict[int, list[Sample]] = {}
    for some in respond(model, prompts, uniforms, sampling, eos_ids=eos_ids, batch_tokens=room, decode=decode):
        found |= some
    return [found[i] for i in range(len(prompts))]


def half_precision_distances(device: str) -> dict[str, float]:
    """Root mean squares between three ways to the log-probabilities of tokens that a bfloat16 model has drawn.

    Ours while drawing them, the trainer's by a forward pass of the same model, and the exact ones of its weights in
    float32. Attention weights are doubled twice over: what rounding does to scores shows.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes, num_key_value_heads=2, vocab_size=512, initializer_range=0.06, bos_token_id=1, eos_token_id=EOS
    )
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 2
        layer.self_attn.k_proj.weight.data *= 2
    exact = LlamaForCausalLM(config).eval()
    exact.load_state_dict(model.bfloat16().state_dict())
    prompts = [torch.randint(3, 512, (n,)).tolist() for n in (30, 80, 50, 10)]
    numbers = torch.rand(4, 4, 40, dtype=torch.float64)
    drawn = sample(model.to(device), prompts, numbers, Sampling(40), eos_ids=[EOS])
    found: dict[str, list[float]] = {"ours": [], "trainer": [], "exact": []}
    for prompt, samples in zip(prompts, drawn, strict=True):
        batch = response_batch([prompt] * 4, [one.token_ids for one in samples], pad_id=0, device=device)
        kept = batch.response_mask.bool()
        for name, by in (("trainer", model), ("exact", exact.to(device))):
            with torch.no_grad():
                logged = response_logits(by, batch).float().log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
            found[name] += logged[kept].tolist()
        found["ours"] += [value for one in samples for value in one.log_probs]
    return {
        f"{a} to {b}": float(np.sqrt(np.mean((np.array(found[a]) - np.array(found[b])) ** 2)))
        for a, b in (("ours", "exact"), ("trainer", "exact"), ("ours", "trainer"))
    }
