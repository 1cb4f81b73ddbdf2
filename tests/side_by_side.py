"""All responses of some prompts in the order of the prompts, as most tests want them."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from models.batching import TokenIds
from models.decoding import Decode, respond
from models.sampling import Sample, Sampling


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
