"""Talking to a policy with the base beside it: real tiny policies, lines in, text out."""

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignment.embedded import policy_folder
from alignment.launch import SOURCE_ROOT
from alignment.rollouts import uniforms
from models.chat import Speaker, main, talk
from models.policy import Policy, load_policy
from models.sampling import Sampling
from side_by_side import sample
from test_policy_source import seal

Sealed = Callable[..., Path]


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[[str], Policy]:
    return lambda form: load_policy(policy_folder("tiny", tmp_path / "cache"), prompt_format=form)  # type: ignore[arg-type]


def response(policy: Policy, text: str, number: int, sampling: Sampling) -> str:
    """The whole response by the sampling of rollouts."""
    numbers = torch.from_numpy(uniforms(f"0/chat/{number}", sampling.max_new_tokens))
    ids = policy.reader.encode(text)
    ((one,),) = sample(policy.model, [ids], numbers[None, None], sampling, eos_ids=policy.eos_ids)
    return policy.reader.decode(ids, one.token_ids)


def said(speakers: list[Speaker], *lines: str, tokens: int = 20, echo: bool = False) -> str:
    out = io.StringIO()
    talk(speakers, iter(lines), out, Sampling(tokens), seed=0, echo=echo)
    return out.getvalue()


def test_pieces_add_up_to_the_response_of_a_rollout(tiny: Callable[[str], Policy]) -> None:
    policy = tiny("text")
    for number in range(5):
        pieces = list(Speaker("a", policy).answer("Once upon", Sampling(30), f"0/chat/{number}"))
        assert "".join(pieces) == response(policy, "Once upon", number, Sampling(30))
        assert len(pieces) > 2  # as the tokens come


def test_both_answer_each_line_with_the_same_numbers(tiny: Callable[[str], Policy]) -> None:
    one, other = (Speaker(name, tiny("text")) for name in ("base", "aligned"))
    shown = said([one, other], "Once\n", "   \n", "upon a\n", echo=True)
    first, second, rest = shown.split("\n\n")
    assert rest == "" and first.startswith("> Once\nbase: ") and second.startswith("> upon a\nbase: ")
    base, aligned = first.removeprefix("> Once\nbase: ").split("\naligned: ")
    assert base == aligned  # the same weights
    with torch.no_grad():
        other.policy.model.model.embed_tokens.weight.mul_(-1)  # type: ignore[union-attr,operator]
    base, changed = said([one, other], "Once\n").removeprefix("base: ").removesuffix("\n\n").split("\naligned: ")
    assert base == aligned and changed != base


def test_a_chat_remembers_until_it_is_told_to_forget(tiny: Callable[[str], Policy]) -> None:
    speaker = Speaker("aligned", tiny("chat"))
    said([speaker], "hi\n", "and?\n")
    assert [m["role"] for m in speaker.said] == ["user", "assistant"] * 2
    assert [m["content"] for m in speaker.said[::2]] == ["hi", "and?"]
    messages = [dict(m) for m in speaker.said[:3]]
    text = speaker.policy.reader.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert speaker.said[3]["content"] == response(speaker.policy, str(text), 1, Sampling(20))
    said([speaker], "/new\n")
    assert speaker.said == []
    plain = Speaker("aligned", tiny("text"))
    said([plain], "hi\n")
    assert plain.said == []


def test_what_cannot_be_answered_says_why_and_the_talk_goes_on(tiny: Callable[[str], Policy]) -> None:
    shown = said([Speaker("base", tiny("text"))], "x" * 250 + "\n", "short\n")
    assert "(250 tokens and --max-new-tokens (20) exceed the 256 that base reads: /new begins anew" in shown
    assert shown.count("base: ") == 2 and not shown.rstrip().endswith(")")


def test_weights_that_give_no_numbers_say_so_and_the_other_policy_answers(tiny: Callable[[str], Policy]) -> None:
    broken, whole = (Speaker(name, tiny("text")) for name in ("base", "aligned"))
    with torch.no_grad():
        next(broken.policy.model.parameters()).fill_(float("nan"))
    shown = said([broken, whole], "Once\n")
    assert shown.startswith("base: (the policy's probabilities are not finite") and "\naligned: (" not in shown


def test_a_response_writes_nothing_to_the_terminal_but_text(tiny: Callable[[str], Policy]) -> None:
    policy = tiny("text")
    shown = "".join(said([Speaker("base", policy)], f"prompt \x1b[2J {i}\n", tokens=60, echo=True) for i in range(8))
    assert all(c.isprintable() or c in "\n\t" for c in shown)


def test_the_command_finds_the_base_and_the_format_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seal(tmp_path / "7", 2, prompt_format="text")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon\n"))
    assert main(["7", "--root", str(tmp_path), "--max-new-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("> Once upon\nbase: ") and "\naligned: " in out
    assert err.splitlines() == [
        f"base: {policy_folder('tiny', tmp_path / 'cache')}",
        f"aligned: {tmp_path / '7' / 'checkpoints' / 'step-000002'}",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon\n"))
    assert main(["7", "--root", str(tmp_path), "--max-new-tokens", "5", "--base", "none"]) == 0
    assert capsys.readouterr().out.startswith("> Once upon\naligned: ")


def test_mistakes_are_told_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(tmp_path)]
    for arguments, message in (
        (["nothing"], "ModelError: the policy (nothing): no such model folder"),
        (["tiny"], "ConfigError: tiny does not say what it was made from: give --base MODEL, or --base none"),
        (["tiny", "--base", "typo"], "ModelError: --base (typo): no such model folder"),
    ):
        assert main([*arguments, *root]) == 1
        assert message in capsys.readouterr().err
    for wrong in (["--temperature", "0"], ["--temperature", "1e-9"], ["--max-new-tokens", "0"], ["--top-p", "none"]):
        with pytest.raises(SystemExit):
            main(["tiny", *wrong])


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "models.chat", *arguments]


def test_help_imports_no_torch() -> None:
    script = (
        "import sys, runpy; sys.argv = ['chat', '--help']\ntry: runpy.run_module('models.chat', run_name='__main__')"
    )
    script += "\nfinally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], cwd=SOURCE_ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "the base beside it" in done.stdout, done.stderr


def test_at_a_terminal_it_asks_and_ends_with_ctrl_d(tmp_path: Path) -> None:
    seal(tmp_path / "7", 2)
    owner, terminal = pty.openpty()
    arguments = ["7", "--root", str(tmp_path), "--max-new-tokens", "3", "--base", "none"]
    process = subprocess.Popen(
        command(*arguments), cwd=SOURCE_ROOT, stdin=terminal, stdout=terminal, stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": "dumb"}, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    seen, keys = b"", [b"\x04", b"caf\xe9\n"]  # Latin-1; and Ctrl-D means the end only to one who asks
    with contextlib.suppress(OSError):  # Linux says so when the other end has closed
        while chunk := os.read(owner, 4096):
            seen += chunk
            if seen.endswith(b"> ") and keys:
                os.write(owner, keys.pop())
    assert process.wait(60) == 0
    assert b"> " in seen and b"aligned: " in seen and b"base: " not in seen


def test_a_reader_that_has_seen_enough_ends_it_without_a_word(tmp_path: Path) -> None:
    seal(tmp_path / "7", 2)
    arguments = ["7", "--root", str(tmp_path), "--max-new-tokens", "3", "--base", "none"]
    process = subprocess.Popen(
        command(*arguments), cwd=SOURCE_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(b"one\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"> one\n"
    process.stdout.close()  # as `head -1` does
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(b"more\n" * 1000)
        process.stdin.close()
    said = process.stderr.read()
    assert process.wait(60) == -signal.SIGPIPE
    assert b"Traceback" not in said and b"BrokenPipe" not in said
