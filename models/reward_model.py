"""The reward model: a Hugging Face encoder or causal LM with a head of one output, or one an attribute.

A text becomes tokens here exactly as in `triton_repo/reward_model/1/model.py`, which must stand alone and so
carries its own copy of `render`, `encode` and `micro_batches`; `tests/test_reward_model.py` holds the two together.

Left out on purpose: any pooling of our own. The head is the one of the model's sequence-classification class,
so that the exported folder loads everywhere as a plain `AutoModelForSequenceClassification`.

Legend: B sequences, T tokens, A outputs.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignment.errors import ConfigError, ModelError
from alignment.types import Message
from models.quiet import quiet_transformers
from models.reward_losses import merged_reward
from models.tokenizer_file import check_tokenizer

PASS_TOKENS = {"cpu": 24, "cuda": 1024}
"""What a forward pass costs beside its tokens, in tokens: on a CPU 9 ms at 0.31 ms a token; guessed for a GPU."""


def load_reward_model(
    source: str, *, seed: int = 0, require_head: bool = False, num_outputs: int = 1
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence-classification model with `num_outputs` outputs, in float32 and evaluation mode, and its tokenizer.

    `source` is a folder or a hub name. A head that the folder lacks, or has with other outputs, is drawn from `seed`;
    with `require_head` (a model served untrained) that is an error, since such scores would be noise. Only
    safetensors are read: nothing is unpickled and no code of the model's repository runs.

    Raises ModelError.
    """
    with _named_errors(source, num_outputs), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config, tokenizer = load_reader(source, num_outputs=num_outputs)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=not require_head,
        )
        body = [key for key, *_ in report["mismatched_keys"] if key.startswith(f"{model.base_model_prefix}.")]
        if body:
            raise ValueError(f"its weights are not those of its config.json: {', '.join(body[:3])}")
    if require_head and report["missing_keys"]:
        raise ModelError(
            f"reward.model ({source}) has no trained head (missing {', '.join(sorted(report['missing_keys']))}): "
            "set reward_training.train, or give a model that was trained with one label"
        )
    return model.eval(), tokenizer


def load_reader(source: str, *, num_outputs: int = 1) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The config, with `num_outputs` outputs, and the tokenizer of a folder or hub name. Raises ModelError."""
    if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise ModelError(f"reward.model ({source}): no such folder; give a model folder or a hub name")
    with _named_errors(source, num_outputs):
        check_tokenizer(source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return AutoConfig.from_pretrained(source, num_labels=num_outputs, trust_remote_code=False), tokenizer


@contextmanager
def _named_errors(source: str, num_outputs: int) -> Iterator[None]:
    """Loading without transformers' reports, and with its many kinds of error as a ModelError."""
    try:
        with quiet_transformers():
            yield
    except Exception as error:  # of many types, where a config or a tokenizer is not what transformers expects
        raise ModelError(
            f"reward.model ({source}) cannot be loaded as a model with {num_outputs} outputs: {_first_line(error)}. "
            "Give a folder or hub name with config.json, safetensors weights and a tokenizer"
        ) from error


def render(template: str, messages: Sequence[Message]) -> str:
    """The text that the reward model reads for one conversation.

    The Jinja settings are those of chat templates, so that one may be pasted; an undefined name is an error.
    Raises ConfigError naming `reward.template`.
    """
    try:
        return _environment().from_string(template).render(messages=list(messages), add_generation_prompt=False)
    # A template may fail in its own arithmetic or attribute access, outside of Jinja's error tree.
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"reward.template cannot render a conversation of {len(messages)} messages "
            f"({type(error).__name__}: {_first_line(error)}): it may use `messages`, each with role and content"
        ) from error


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text, special tokens included, at most `max_tokens` long.

    An over-long text loses its start, since the response stands at the end; special tokens are kept. A text
    whose template already wrote the opening special token gets no second set of them.
    """
    tokenizer.truncation_side = "left"
    opening = tuple(t for t in (tokenizer.bos_token, tokenizer.cls_token) if t)
    rows = []
    for text in texts:
        if opening and text.startswith(opening):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            rows.append(ids if len(ids) <= max_tokens else ids[:1] + ids[len(ids) - max_tokens + 1 :])
        else:
            rows.append(tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"])
    return rows


def score_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_tokens: int,
    token_budget: int = 4096,
) -> list[list[float]]:
    """The head's outputs for rendered texts, in order; the in-process twin of the served model. Shape: (B, A)."""
    rows = encode(tokenizer, texts, max_tokens)
    outputs: list[list[float]] = [[] for _ in rows]
    model.eval()
    with torch.inference_mode():
        for indices in micro_batches([len(row) for row in rows], token_budget, PASS_TOKENS[model.device.type]):
            batch = forward_rows(model, [rows[i] for i in indices], model.device).tolist()
            for index, values in zip(indices, batch, strict=True):
                outputs[index] = values
    return outputs


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_tokens: int,
    merge_weights: Sequence[float] = (1.0,),
) -> list[float]:
    """Rewards of rendered texts, in order: the head's outputs, each times its weight, summed."""
    outputs = score_outputs(model, tokenizer, texts, max_tokens=max_tokens)
    rewards: list[float] = merged_reward(
        torch.tensor(outputs).reshape(-1, len(merge_weights)), torch.tensor(merge_weights)
    ).tolist()
    return rewards


def micro_batches(lengths: Sequence[int], token_budget: int, pass_tokens: int) -> list[list[int]]:
    """Indices by rising length, cut where the sum of padded tokens and of the passes' fixed costs is smallest.

    Rows times the longest of a cut stays within the budget, a single row apart. `pass_tokens` is what a forward pass
    costs beside its tokens, in tokens. cost[j] is the least cost of the j shortest rows, start[j] where their last
    cut begins.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cost, start = [0], [0]
    for end, index in enumerate(order, 1):
        longest = lengths[index]
        starts = range(max(0, end - max(1, token_budget // longest)), end)
        begin = min(starts, key=lambda i: cost[i] + (end - i) * longest)
        cost.append(cost[begin] + (end - begin) * longest + pass_tokens)
        start.append(begin)
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[start[end] : end])
        end = start[end]
    return batches[::-1]


def forward_rows(model: Any, rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Outputs of the head for encoded texts, padded on the right to the longest. Shape: returns (B, A) in float32.

    Decoders read their reward at the last token that differs from the config's padding id, and a text may well
    end with that very token (padding is often the ending token): then another id is the padding of this batch.
    """
    config, ends = model.config.get_text_config(), {row[-1] for row in rows}
    own = config.pad_token_id
    filler = own if own is not None and own not in ends else next(i for i in itertools.count() if i not in ends)
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.full((len(rows), int(lengths.max())), filler)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    config.pad_token_id = filler
    try:
        logits: Tensor = model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
    finally:
        config.pad_token_id = own
    return logits.float()


def _environment() -> ImmutableSandboxedEnvironment:
    """Chat templates' Jinja settings in a sandbox; a misspelt field is an error, not an empty string."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _raise_exception(message: str) -> None:
    """Chat templates refuse a conversation by calling `raise_exception`."""
    raise TemplateError(message)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
