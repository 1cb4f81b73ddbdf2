"""Talk to a policy, the base beside it: what did the alignment change?

    python -m models.chat runs/latest                   # a prompt a line, until Ctrl-D
    python -m models.chat runs/latest < prompts.txt     # the same for a file: one prompt a line

Both answer the same prompt with the same random numbers, so that a difference comes from the weights. A policy that was
trained as a chat remembers the conversation, each of the two its own (/new forgets it); one that continues texts begins
anew with every line. The policy is a run (its best checkpoint by validation), a checkpoint, `smollm2-135m`, a model
folder or a hub name; the base is what the run began with, unless --base names another (`--base none` for none).
"""

import argparse
import io
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from alignment.errors import AlignmentError, ConfigError, DataError, TrainingError
from alignment.types import Message, Prompt

if TYPE_CHECKING:
    from models.policy import Policy
    from models.sampling import Sampling

NEW = "/new"
UNFINISHED = "�"
"""What a tokenizer makes of half a character."""


@dataclass
class Speaker:
    """One of the two, with the conversation it remembers."""

    name: str
    policy: "Policy"
    said: list[Message] = field(default_factory=list)

    def answer(self, text: str, sampling: "Sampling", stream: str) -> Iterator[str]:
        """Pieces of the response to `text` as they are drawn; `stream` names the randomness.

        Raises DataError for a conversation that the policy cannot read, TrainingError where its output is not finite.
        """
        import torch

        from alignment.rollouts import uniforms
        from models.decoding import stream as tokens_of

        reader, turn = self.policy.reader, Message(role="user", content=text)
        ids = reader.encode(reader.text(Prompt("yours", (*self.said, turn))))
        if not ids:
            raise DataError("the prompt has no tokens: write something")
        if reader.context is not None and len(ids) + sampling.max_new_tokens > reader.context:
            raise DataError(
                f"{len(ids)} tokens and --max-new-tokens ({sampling.max_new_tokens}) exceed the {reader.context} that "
                f"{self.name} reads: {NEW} begins anew, or lower --max-new-tokens"
            )
        numbers = torch.from_numpy(uniforms(stream, sampling.max_new_tokens))
        drawn: list[int] = []
        shown = ""
        for token in tokens_of(self.policy.model, ids, numbers, sampling, eos_ids=self.policy.eos_ids):
            drawn.append(token)
            whole = reader.decode(ids, drawn)
            if not whole.endswith(UNFINISHED):
                yield whole[len(shown) :]
                shown = whole
        whole = reader.decode(ids, drawn)
        yield whole[len(shown) :]
        if reader.prompt_format == "chat":
            self.said += [turn, Message(role="assistant", content=whole)]


def talk(
    speakers: list[Speaker], lines: Iterator[str], out: TextIO, sampling: "Sampling", *, seed: int, echo: bool
) -> None:
    """Answer each line by all speakers, one after the other, as the tokens come; `echo` repeats the lines.

    Raises nothing for a prompt that cannot be answered: it says why and goes on.
    """
    for number, line in enumerate(lines):
        text = line.rstrip("\n")
        if text.strip() == NEW:
            for speaker in speakers:
                speaker.said.clear()
            continue
        if not text.strip():
            continue
        if echo:
            print(f"> {_printable(text)}", file=out)
        for speaker in speakers:
            print(f"{speaker.name}: ", end="", file=out)
            try:
                for piece in speaker.answer(text, sampling, f"{seed}/chat/{number}"):
                    print(_printable(piece), end="", file=out, flush=True)
            except (DataError, TrainingError) as error:
                print(f"({error})", end="", file=out)
            print(file=out)
        print(file=out, flush=True)


def _printable(text: str) -> str:
    """Without control characters, which could write anything to a terminal; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else UNFINISHED for c in text)


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 at the end of the prompts, 1 when a policy cannot be loaded."""
    options = _parser().parse_args(arguments)
    # DeepSpeed, which transformers imports, would otherwise look for an accelerator and warn that it found none.
    os.environ.setdefault("DS_ACCELERATOR", options.device)
    try:
        speakers = _speakers(options)
    except AlignmentError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1
    from models.sampling import Sampling

    sampling = Sampling(options.max_new_tokens, options.temperature, top_p=options.top_p)
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # else a stray byte ends it all
    lines = _asked() if interactive else iter(sys.stdin)
    try:
        talk(speakers, lines, sys.stdout, sampling, seed=options.seed, echo=not interactive)
    except KeyboardInterrupt:
        print()
    return 0


def _asked() -> Iterator[str]:
    import readline  # noqa: F401 its import gives input() a history and editing

    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _speakers(options: argparse.Namespace) -> list[Speaker]:
    """The base, unless there is none, and the policy. Raises AlignmentError."""
    from alignment.policy_source import find_policy, prompt_format_of
    from models.policy import load_policy

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    own = find_policy(options.policy, root=options.root, key="the policy", on_note=note)
    form = prompt_format_of(own, options.prompt_format)
    base = options.base or ((own.run_config or {}).get("policy") or {}).get("model")
    if base is None:
        raise ConfigError(f"{options.policy} does not say what it was made from: give --base MODEL, or --base none")
    sources = {"aligned": own}
    if base != "none":
        found = find_policy(base, root=options.root, key="--base", on_note=note)
        sources = {"base": found, **sources}
    for name, source in sources.items():
        note(f"{name}: {source.checkpoint.uri}")
    return [
        Speaker(name, load_policy(source.folder, prompt_format=form, device=options.device))
        for name, source in sources.items()
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", help="run, checkpoint, `smollm2-135m`, model folder or hub name; s3:// too")
    parser.add_argument(
        "--base", help="what to put beside it, named in the same ways, or `none`; else what it began as"
    )
    parser.add_argument("--prompt-format", choices=("text", "chat"), help="how prompts are read; else as trained")
    parser.add_argument("--max-new-tokens", type=_positive, default=64, help="longest response, in tokens")
    parser.add_argument("--temperature", type=_number, default=1.0, help="1 samples as the policy was trained")
    parser.add_argument("--top-p", type=_number, default=1.0, help="sample among the likeliest of this probability")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other responses")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what computes")
    parser.add_argument("--root", default="runs", help="run root, for runs that are named by their id")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _number(text: str) -> float:
    """A temperature or a share. Logits that are divided by less than 0.001 may leave float32."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.001 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0.001")
    return value


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends it without a word
    sys.exit(main())
