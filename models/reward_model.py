"""The reward model: a Hugging Face encoder with one scalar output, trained on pairs by Bradley and Terry's model.

A text becomes tokens here exactly as in `triton_repo/reward_model/1/model.py`, which must stand alone and so
carries its own copy of `render` and `encode`; `tests/test_reward_model.py` holds the two together.

Left out on purpose: any pooling of our own. The head is the one of the model's sequence-classification class,
so that the exported folder loads everywhere as a plain `AutoModelForSequenceClassification`.

Legend: B sequences, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignment.errors import ConfigError, DataError, ModelError
from alignment.types import Message
from models.losses import bradley_terry_loss
from models.quiet import quiet_transformers

OnStep = Callable[[int, int, float], None]


def load_reward_model(
    source: str, *, seed: int = 0, require_head: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence-classification model with one output, in float32 and evaluation mode, and its tokenizer.

    `source` is a folder or a hub name. A head that the folder lacks is drawn from `seed`; with `require_head`
    (a model served untrained) that is an error, since such scores would be noise. Only safetensors are read:
    nothing is unpickled and no code of the model's repository runs.

    Raises ModelError.
    """
    with _named_errors(source), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config, tokenizer = load_reader(source)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if require_head and report["missing_keys"]:
        raise ModelError(
            f"reward.model ({source}) has no trained head (missing {', '.join(sorted(report['missing_keys']))}): "
            "set reward.train_pairs, or give a model that was trained with one label"
        )
    _check_padding(source, model, tokenizer)
    return model.eval(), tokenizer


def load_reader(source: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The config, with one output, and the tokenizer of a folder or hub name. Raises ModelError."""
    if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise ModelError(f"reward.model ({source}): no such folder; give a model folder or a hub name")
    with _named_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return AutoConfig.from_pretrained(source, num_labels=1, trust_remote_code=False), tokenizer


@contextmanager
def _named_errors(source: str) -> Iterator[None]:
    """Loading without transformers' reports, and with its many kinds of error as a ModelError."""
    try:
        with quiet_transformers():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"reward.model ({source}) cannot be loaded as a model with one scalar output: {_first_line(error)}. "
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


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_tokens: int,
    batch_size: int = 64,
) -> list[float]:
    """Rewards of rendered texts, in order; the in-process twin of the served model."""
    rows = encode(tokenizer, texts, max_tokens)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    rewards = [0.0] * len(rows)
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            for index, reward in zip(indices, _forward(model, [rows[i] for i in indices]).tolist(), strict=True):
                rewards[index] = reward
    return rewards


def train_reward_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts_chosen: Sequence[str],
    texts_rejected: Sequence[str],
    *,
    lr: float,
    batch_size: int,
    epochs: int,
    max_tokens: int,
    seed: int,
    on_step: OnStep | None = None,
) -> list[float]:
    """Train in place with AdamW, the rate falling linearly to 0; returns the loss of each step, in nats.

    `batch_size` is pairs per step; both texts of a pair go through one forward pass, padded to the longest of
    the batch. The result is a function of the arguments and the number of threads; the caller's random state
    is untouched. `on_step(step, steps, loss)` is called after each step, counted from 1.

    Raises DataError without pairs, ModelError when the loss is not finite.
    """
    if not texts_chosen:
        raise DataError("reward.train_pairs gave no pairs to train the reward model on")
    chosen, rejected = encode(tokenizer, texts_chosen, max_tokens), encode(tokenizer, texts_rejected, max_tokens)
    pairs = list(zip(chosen, rejected, strict=True))
    steps = epochs * -(-len(pairs) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    losses: list[float] = []
    model.train()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for batch in _batches(pairs, batch_size, epochs, seed):
            rewards = _forward(model, [row for row, _ in batch] + [row for _, row in batch])
            loss = bradley_terry_loss(*rewards.split(len(batch)))
            if not torch.isfinite(loss):
                raise ModelError(
                    f"the reward model's loss became {loss.item()} at step {len(losses) + 1} of {steps}: "
                    f"lower reward.lr ({lr})"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if on_step is not None:
                on_step(len(losses), steps, losses[-1])
    model.eval()
    return losses


def pairwise_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts_chosen: Sequence[str],
    texts_rejected: Sequence[str],
    *,
    max_tokens: int,
    batch_size: int = 64,
) -> float:
    """Share of pairs whose chosen text scores above the rejected one; ties count one half. Raises DataError."""
    if not texts_chosen:
        raise DataError("reward.held_out_pairs gave no pairs to measure the reward model's accuracy on")
    chosen = score_texts(model, tokenizer, texts_chosen, max_tokens=max_tokens, batch_size=batch_size)
    rejected = score_texts(model, tokenizer, texts_rejected, max_tokens=max_tokens, batch_size=batch_size)
    wins = [1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(chosen, rejected, strict=True)]
    return sum(wins) / len(wins)


def _forward(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Rewards of encoded texts, padded on the right to the longest. Shape: returns (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.full((len(rows), int(lengths.max())), int(model.config.pad_token_id or 0))
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    logits: Tensor = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device)).logits
    return logits.squeeze(-1).float()


def _batches(pairs: list[Any], batch_size: int, epochs: int, seed: int) -> Iterator[list[Any]]:
    """Each epoch's pairs in a new order given by the seed; the last batch of an epoch may be short."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            yield [pairs[i] for i in order[start : start + batch_size]]


def _check_padding(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Decoders find the last token by the padding id, so it must exist; encoders mask it and need none."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if model.config.pad_token_id is None:
        raise ModelError(
            f"reward.model ({source}) has no padding token: set pad_token in its tokenizer_config.json and "
            "pad_token_id in its config.json to a token that no conversation ends with"
        )


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
