"""Prompts: formats, fetching, splits and the order in which they are read."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.errors import ConfigError, DataError
from alignment.files import local_copy, read_jsonl
from alignment.prompts import exclude_overlap, read_order, read_prompts, split_held_out
from alignment.reviews import FRAME, PROMPT_WORDS
from alignment.types import Prompt

ROOT = Path(__file__).resolve().parents[1]
HH = Path(__file__).resolve().parents[2] / "shared/data/hh-harmless-sample.jsonl.gz"

ORDER_OF_SEVEN = [[5, 0, 1], [3, 5, 1], [2, 0, 4], [3, 5, 1]]


def prompt(prompt_id: str, text: str) -> Prompt:
    return Prompt(prompt_id, ({"role": "user", "content": text},))


def write(path: Path, *records: Any) -> str:
    lines = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


@pytest.mark.parametrize("name", ["set.jsonl", "set.jsonl.gz"])
def test_each_format_gives_the_same_messages(tmp_path: Path, name: str) -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    source = write(
        tmp_path / name,
        {"text": "Once upon "},
        {"prompt": "Why?", "id": "why"},
        "",
        {"prompt": turns, "id": 7},
        {"messages": turns},
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
        },
    )
    assert read_prompts(source, tmp_path) == [
        prompt("set:1", "Once upon "),
        prompt("why", "Why?"),
        Prompt("7", tuple(turns)),  # type: ignore[arg-type]
        Prompt("set:5", tuple(turns)),  # type: ignore[arg-type]
        Prompt(
            "set:6",
            (
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ),
            reference="d",
        ),
    ]


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "?"}, "expected one of text, prompt, messages, found question"),
        ({"text": "a", "prompt": "b"}, "found text, prompt"),
        ({}, "found none"),
        ({"text": ["a"]}, '"text" must be a string, found list'),
        ({"text": " \n"}, "the prompt is an empty text"),
        ({"prompt": 3}, "expected a list of messages, found int '3'"),
        ({"messages": "hi"}, '"messages" must be a list, found str'),
        ({"messages": []}, "expected a list of messages"),
        ({"messages": ["hi"]}, 'message 0 must be {"role", "content"}, found str'),
        (
            {"messages": [USER, {"role": "bot", "content": "y"}]},
            "the role of message 1 must be one of .* found str 'bot'",
        ),
        ({"messages": [{"role": "user"}]}, "the content of message 0 must be a string, found NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "must be a string, found list"),
        ({"messages": [USER, {"role": "assistant", "content": "y"}]}, "last message is the user's, found assistant"),
        ({"chosen": 1, "rejected": "a"}, "found int and str"),
        ({"text": "a", "id": 1.5}, '"id" must be a string or an integer, found 1.5'),
        ({"text": "a", "id": ""}, '"id" must be'),
        ('{"text": "a"', "not a JSON object in UTF-8"),
        ('["a"]', "expected a JSON object, found list"),
        ('{"text": "half of a pair: \\ud83d"}', "not a JSON object in UTF-8"),
    ],
)
def test_a_bad_line_is_named_with_what_was_found(tmp_path: Path, record: Any, said: str) -> None:
    source = write(tmp_path / "set.jsonl", {"text": "fine"}, record)
    with pytest.raises(DataError, match=rf"set\.jsonl:2: .*{said}"):
        read_prompts(source, tmp_path)


def test_ids_are_unique_and_files_hold_something(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set\.jsonl:2: the id 'a' is already that of line 1"):
        read_prompts(write(tmp_path / "set.jsonl", {"text": "x", "id": "a"}, {"text": "y", "id": "a"}), tmp_path)
    with pytest.raises(DataError, match="holds no usable prompt"):
        read_prompts(write(tmp_path / "empty.jsonl"), tmp_path)


def test_a_pair_without_a_shared_prompt_is_reported_or_refused(tmp_path: Path) -> None:
    source = write(
        tmp_path / "hh.jsonl",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: A\n\nAssistant: c"},
        {"chosen": "\n\nHuman: a\n\nHuman: b", "rejected": "\n\nHuman: A\n\nAssistant: c"},
    )
    excluded: list[tuple[str, str]] = []
    prompts = read_prompts(source, tmp_path, lambda prompt_id, reason: excluded.append((prompt_id, reason)))
    assert prompts == [replace(prompt("hh:1", "a"), reference="b")]
    assert excluded == [("hh:2", "two different prompts"), ("hh:3", "malformed dialogue")]
    with pytest.raises(DataError, match=r"hh\.jsonl:2: the prompt hh:2 cannot be used: two different prompts"):
        read_prompts(source, tmp_path)


@pytest.mark.skipif(not HH.exists(), reason="needs the HH-RLHF sample beside the repository")
def test_real_transcripts_give_prompts_that_end_with_the_user(tmp_path: Path) -> None:
    excluded: list[str] = []
    prompts = read_prompts(str(HH), tmp_path, lambda prompt_id, _: excluded.append(prompt_id))
    assert len(prompts) + len(excluded) == 1000 and 0 < len(excluded) < 10
    assert all(p.messages[-1]["role"] == "user" for p in prompts)


def test_a_truncated_gzip_and_a_foreign_encoding_name_the_line(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": hashlib.sha256(b"%d" % i).hexdigest()}) + "\n" for i in range(1000))
    whole = gzip.compress(lines.encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz:\d+: the gzip stream is damaged or cut off"):
        list(read_jsonl(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    with pytest.raises(DataError, match="damaged or cut off"):
        list(read_jsonl(tmp_path / "plain.jsonl.gz"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: not a JSON object in UTF-8"):
        list(read_jsonl(tmp_path / "latin.jsonl"))


def test_line_separators_inside_strings_end_no_line(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"text": "a\u2028b\x85c"}\r\n{"text": "d"}', encoding="utf-8", newline="")
    assert list(read_jsonl(tmp_path / "set.jsonl")) == [(1, {"text": "a\u2028b\x85c"}), (2, {"text": "d"})]


def test_wrong_sources_are_named(tmp_path: Path) -> None:
    for source, said in (
        (str(tmp_path / "none.jsonl"), "none.jsonl: no such file"),
        (str(tmp_path), "is a folder"),
        ("ftp://host/file.jsonl", "unknown scheme ftp://"),
        ("s3://bucket", "expected s3://bucket/key"),
        ("hf://Anthropic/hh-rlhf/train.jsonl", "expected hf://datasets/OWNER/NAME/PATH"),
        ("imdb:promts", "known: imdb:prompts, imdb:held_out_prompts"),
        ("imdb:pairs", "no built-in prompts of that name"),
        ("toy:pairs", "no toy prompts of that name"),
    ):
        with pytest.raises(DataError, match=said):
            read_prompts(source, tmp_path)


class StandInStore(ThreadingHTTPServer):
    """A stand-in for S3 and for the hub: it answers HEAD and GET of one object and lists what it was asked."""

    content = b'{"text": "from afar"}\n'
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _StandInAnswers)
        self.asked: list[tuple[str, str]] = []
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _StandInAnswers(BaseHTTPRequestHandler):
    server: StandInStore

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        self.server.asked.append((self.command, self.path))
        content, etag = self.server.content, f'"{hashlib.md5(self.server.content).hexdigest()}"'
        matches = self.headers.get("If-Match", etag) == etag
        self.send_response(self.server.status if matches else 412)
        self.send_header("ETag", etag)
        self.send_header("X-Repo-Commit", hashlib.sha1(content).hexdigest())
        self.send_header("Content-Length", str(len(content) if self.server.status == 200 and matches else 0))
        self.end_headers()
        if with_body and self.server.status == 200 and matches:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def store() -> Iterator[StandInStore]:
    with StandInStore() as server:
        yield server
        server.shutdown()


def test_an_s3_object_is_fetched_once_and_again_when_it_changed(
    store: StandInStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"ENDPOINT_URL": store.url, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    uri = "s3://bucket/folder/set.jsonl"
    assert read_prompts(uri, tmp_path) == [prompt("set:1", "from afar")]
    first = local_copy(uri, tmp_path)
    assert [command for command, _ in store.asked] == ["HEAD", "GET", "HEAD"]
    assert store.asked[0][1] == "/bucket/folder/set.jsonl"
    assert [p.name for p in first.parent.iterdir()] == ["set.jsonl"]
    store.content = b'{"text": "changed"}\n'
    assert read_prompts(uri, tmp_path) == [prompt("set:1", "changed")]
    store.status = 403
    with pytest.raises(DataError, match=r"s3://bucket/folder/set\.jsonl: cannot be fetched: .*403.*credentials"):
        local_copy(uri, tmp_path)


def test_a_file_of_a_hub_data_set_is_fetched(store: StandInStore, tmp_path: Path) -> None:
    # The hub's address is read when huggingface_hub is imported, so this needs a process of its own.
    script = (
        "import sys; from pathlib import Path; from alignment.prompts import read_prompts\n"
        "print(read_prompts('hf://datasets/owner/name/folder/set.jsonl', Path(sys.argv[1]))[0].prompt_id)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": store.url, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "set:1\n", done.stderr
    assert "/datasets/owner/name/resolve/main/folder/set.jsonl" in {path for _, path in store.asked}


def test_built_in_review_prompts_are_framed_and_disjoint() -> None:
    train, held_out = (read_prompts(name, Path("unused")) for name in ("imdb:prompts", "imdb:held_out_prompts"))
    assert (len(train), len(held_out)) == (7991, 2888)
    everyone = [*train, *held_out]
    assert len({p.prompt_id for p in everyone}) == len({p.messages[0]["content"] for p in everyone}) == len(everyone)
    for p in everyone:
        text = p.messages[0]["content"]
        assert text.startswith(FRAME) and len(text[len(FRAME) :].split()) == PROMPT_WORDS and "<br" not in text
    assert read_prompts("imdb:prompts", Path("unused")) == train


def test_toy_prompts_are_distinct_and_disjoint() -> None:
    train, held_out = (read_prompts(name, Path("unused")) for name in ("toy:prompts", "toy:held_out_prompts"))
    assert len(train) >= 64 and len(held_out) >= 64
    texts = [p.messages[0]["content"] for p in (*train, *held_out)]
    assert len(set(texts)) == len(texts) and max(map(len, texts)) < 32


def test_held_out_prompts_are_split_without_sharing_a_text() -> None:
    prompts = [prompt(f"p{i}", f"text {i % 10}") for i in range(30)]  # each text three times
    validation, evaluation = split_held_out(prompts, num_validation=3, num_evaluation=7, seed=1)
    assert (len(validation), len(evaluation)) == (3, 7)
    assert len({p.messages[0]["content"] for p in (*validation, *evaluation)}) == 10
    assert split_held_out(prompts, num_validation=3, num_evaluation=7, seed=1) == (validation, evaluation)
    assert split_held_out(prompts, num_validation=3, num_evaluation=7, seed=2) != (validation, evaluation)
    with pytest.raises(
        ConfigError, match=r"validation\.num_prompts \(4\) \+ evaluation\.num_prompts \(7\) .* 10 distinct"
    ):
        split_held_out(prompts, num_validation=4, num_evaluation=7, seed=1)


def test_training_prompts_of_a_held_out_text_are_excluded_with_a_reason() -> None:
    train = [prompt("t1", "a"), prompt("t2", "b"), Prompt("t3", ({"role": "system", "content": "b"},))]
    kept, excluded = exclude_overlap(train, [prompt("h1", "b"), prompt("h2", "c")])
    assert [p.prompt_id for p in kept] == ["t1", "t3"]
    assert excluded == [("t2", "same text as held-out prompt h1")]


@given(num_prompts=st.integers(1, 40), data=st.data(), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_an_epoch_reads_no_prompt_twice(num_prompts: int, data: st.DataObject, seed: int, epoch: int) -> None:
    samples = data.draw(st.integers(1, num_prompts))
    steps = num_prompts // samples
    read = [
        index
        for step in range(epoch * steps, (epoch + 1) * steps)
        for index in read_order(num_prompts, num_rollout_samples=samples, seed=seed, step=step)
    ]
    assert len(read) == len(set(read)) == steps * samples
    assert set(read) <= set(range(num_prompts))


def test_in_the_long_run_each_prompt_is_read_alike() -> None:
    # 10 prompts, 4 a step: an epoch leaves 2 out, so 500 epochs read each 400 times, give or take 9 (one sigma).
    reads = Counter(index for step in range(1000) for index in read_order(10, num_rollout_samples=4, seed=0, step=step))
    assert sum(reads.values()) == 4000 and all(350 < reads[i] < 450 for i in range(10))


def test_the_order_is_written_down_and_hangs_on_seed_and_epoch() -> None:
    # Held fixed: a resumed run must read on from where an older version of this program stopped.
    assert [read_order(7, num_rollout_samples=3, seed=0, step=step) for step in (2, 0, 1, 0)] == ORDER_OF_SEVEN
    assert read_order(7, num_rollout_samples=3, seed=1, step=0) != ORDER_OF_SEVEN[1]
    with pytest.raises(ConfigError, match=r"rollouts\.num_rollout_samples \(8\) must be <= the 7 usable prompts"):
        read_order(7, num_rollout_samples=8, seed=0, step=0)
