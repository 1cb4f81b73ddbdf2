"""The policy: a Hugging Face causal LM, and its reader, which turns a prompt into token ids and back."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from alignment.errors import ConfigError, DataError, ModelError
from alignment.types import Conversation, Prompt
from models.memory import is_out_of_memory
from models.quiet import quiet_transformers
from models.tokenizer_file import check_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig

PromptFormat = Literal["text", "chat"]
Dtype = Literal["auto", "float32", "bfloat16", "as_stored"]


@dataclass(frozen=True, slots=True)
class PromptReader:
    """The policy's tokenizer and its rule for rendering prompts. `context` is the model's limit in tokens."""

    tokenizer: PreTrainedTokenizerBase
    prompt_format: PromptFormat
    context: int | None

    def text(self, prompt: Prompt) -> str:
        """The prompt as the policy reads it. Raises DataError for one that its format cannot express."""
        if self.prompt_format == "chat":
            return self.render(prompt.messages, f"prompt {prompt.prompt_id}", generation_prompt=True)
        if len(prompt.messages) != 1:
            raise DataError(
                f"prompt {prompt.prompt_id} has {len(prompt.messages)} messages, but policy.prompt_format (text) "
                "continues a single text: set policy.prompt_format=chat"
            )
        return prompt.messages[0]["content"]

    def render(self, messages: Conversation, what: str, *, generation_prompt: bool) -> str:
        """Messages as the chat template lays them out. Raises DataError naming `what` they are."""
        turns = [{"role": m["role"], "content": m["content"]} for m in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)
            )
        # Templates refuse roles and orders of their own, and may fail in their own arithmetic or attribute access.
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise DataError(f"{what}: the policy's chat template refuses it: {error}") from error

    def encode_more(self, text: str) -> list[int]:
        """Token ids of a text that goes on from another: no special tokens are put before it."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt; a chat template brings its own special tokens."""
        ids = self.tokenizer(text, add_special_tokens=self.prompt_format == "text", verbose=False)["input_ids"]
        return list(ids)

    def decode(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        """A response's text, special tokens left out, as it continues its prompt.

        A SentencePiece tokenizer drops the leading space of a text that is decoded by itself.
        """
        before = str(self.tokenizer.decode(list(prompt_ids), skip_special_tokens=True))
        whole = str(self.tokenizer.decode([*prompt_ids, *response_ids], skip_special_tokens=True))
        if whole.startswith(before):
            return whole[len(before) :]
        return str(self.tokenizer.decode(list(response_ids), skip_special_tokens=True))


@dataclass(frozen=True, slots=True)
class Policy:
    """A causal LM that can be sampled from. `eos_ids` holds every token that ends a response."""

    model: PreTrainedModel
    reader: PromptReader
    eos_ids: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device


def load_reader(source: str | Path, *, prompt_format: PromptFormat, chat_template: str | None = None) -> PromptReader:
    """Tokenizer and context length of a model folder or hub name; `chat_template` takes the place of its own.

    Raises ModelError or ConfigError.
    """
    with _named_errors(source):
        check_tokenizer(source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if prompt_format == "chat" and not tokenizer.chat_template:
        raise ConfigError(f"policy.prompt_format (chat) needs a chat template, and {source} has none: use text")
    return PromptReader(tokenizer, prompt_format, context)


def resolved_dtype(dtype: Dtype, *, gpu: bool) -> Dtype:
    """The type that `auto` stands for, bf16 on a GPU and fp32 on a CPU; any other is itself."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if gpu else "float32"


def load_policy(
    source: str | Path,
    *,
    prompt_format: PromptFormat,
    device: str = "cpu",
    chat_template: str | None = None,
    dtype: Dtype = "auto",
) -> Policy:
    """A policy from a model folder or a hub name, in what `resolved_dtype` says.

    `chat_template` as in `load_reader`. Raises ModelError naming the folder and the remedy.
    """
    reader = load_reader(source, prompt_format=prompt_format, chat_template=chat_template)
    dtype = resolved_dtype(dtype, gpu=device != "cpu")
    with _named_errors(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto" if dtype == "as_stored" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, report = loaded
        if report["missing_keys"]:  # transformers makes up what it does not find
            raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}, so noise would answer")
        model = model.to(torch.device(device))
    model.eval()
    return Policy(model, reader, _eos_ids(model.generation_config, reader.tokenizer, source))


def load_ending_tokens(source: str | Path, reader: PromptReader) -> tuple[int, ...]:
    """The tokens that end a response of the model behind `source`, as its policy has them, without its weights."""
    from transformers import GenerationConfig

    with _named_errors(source):
        try:
            generation = GenerationConfig.from_pretrained(source)
        except OSError:  # it has none of its own: transformers makes one as the model is loaded
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            generation = GenerationConfig.from_model_config(config)
    return _eos_ids(generation, reader.tokenizer, source)


@contextmanager
def _named_errors(source: str | Path) -> Iterator[None]:
    """Loading without transformers' reports, and with its many kinds of error as a ModelError."""
    try:
        with quiet_transformers():
            yield
    except Exception as error:  # transformers raises OSError, ValueError, SafetensorError and others here
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if is_out_of_memory(error):
            raise ModelError(
                f"there is too little memory to load the policy from {source}: {first_line}. Take a smaller "
                "policy.model, or a device with more memory"
            ) from error
        raise ModelError(
            f"cannot load the policy from {source}: {first_line}. "
            "Set policy.model to a folder that save_pretrained wrote, or to a hub name that is reachable"
        ) from error


def _eos_ids(
    generation: "GenerationConfig | None", tokenizer: PreTrainedTokenizerBase, source: str | Path
) -> tuple[int, ...]:
    """The tokenizer's ending token first, then those of the generation config (chat models have several)."""
    configured = generation.eos_token_id if generation else None
    candidates: Iterable[Any] = configured if isinstance(configured, list) else [configured]
    ids = [i for i in [tokenizer.eos_token_id, *candidates] if isinstance(i, int)]
    if not ids:
        raise ModelError(f"{source} names no ending token: set eos_token in its tokenizer_config.json")
    return tuple(dict.fromkeys(ids))


def check_context(reader: PromptReader, *, max_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise ConfigError where the longest prompt and response together exceed the policy's context."""
    if reader.context is not None and max_prompt_tokens + max_new_tokens > reader.context:
        raise ConfigError(
            f"prompts.max_prompt_tokens ({max_prompt_tokens}) + rollouts.max_new_tokens ({max_new_tokens}) "
            f"must be <= the policy's context of {reader.context} tokens: lower one of them"
        )
