"""Damaged and hostile inputs, made from good ones: all of a seed, so that a finding can be made again."""

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

TOKENS = (
    *(
        b"\x00",
        b"\xff\xfe",
        b"\r\n",
        b"\n",
        b"\t",
        b'"',
        b"\\",
        b"\\ud800",
        b"\\u0000",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
    ),
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 30, b"9" * 5000, b"\xc3\x28", b"\xed\xa0\x80"),
    *(
        b"../../../etc/passwd",
        b"/etc/passwd",
        b"\x1b[2J\x1b]0;x\x07",
        b"%s%n",
        b"[" * 300,
        b'{"a":' * 2000,
        b"$(touch x)",
    ),
)
"""What parsers trip over: halves of structures, numbers beyond their type, texts that are no UTF-8, paths, escapes."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 2**31, 2**63, 10**25, 0.5, -1e308, float("nan"), float("inf"), "", " ", "a", "0", "-1"),
    *(
        "\n\nHuman: a\n\nAssistant: b",
        "../../x",
        "/etc/passwd",
        "..",
        ".",
        "a/b",
        "\ud800",
        "\x00",
        "\x1b[2J",
        "e\u0301",
    ),
    *("x" * 100_000, [], {}, [[]], [None], {"": ""}, [1, "a"], {"role": "user", "content": "a"}, "\u202e", "1e-5"),
)


NESTS = {
    f"<{depth} {kind}>": text
    for depth in (20, 150, 900, 20_000)
    for kind, text in (("lists", "[" * depth + "]" * depth), ("objects", '{"a":' * depth + "1" + "}" * depth))
}
"""Texts of deeply nested JSON, by what stands for them in a value: a value itself is too deep for Python to copy."""


def mutated_bytes(rng: random.Random, seeds: Sequence[bytes], tokens: Sequence[bytes] = TOKENS) -> bytes:
    """One of the seeds after a few changes: bits, spans that go or come twice, tokens, parts of another seed."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 8, 64, 1024)))
        match rng.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end] * rng.choice((1, 2, 50))
            case 4:
                data[at:at] = rng.choice(tokens)
            case 5:
                data[at:end] = rng.choice(tokens)
            case 6:
                other = rng.choice(seeds)
                cut = rng.randrange(len(other) + 1)
                data[at:end] = other[cut : cut + 64]
            case 7:
                data[at:] = b""
    return bytes(data[: 1 << 20])


def mutated_value(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value in which a few places hold something else, are gone, renamed or twice."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = rng.choice(_places(root))
        match rng.randrange(7):
            case 0 if isinstance(holder, dict):
                holder[rng.choice(("", "step", "..", "\ud800", "\x1b[2J\n", key + "x", "x" * 300))] = holder.pop(key)
            case 1 if holder is not root:
                del holder[key]
            case 2 if isinstance(holder, list) and holder is not root:
                holder.insert(key, copy.deepcopy(holder[key]))
            case 3:
                holder[key] = rng.choice(list(NESTS))
            case 4:
                holder[key] = copy.deepcopy(rng.choice([holder[key] for holder, key in _places(root)]))
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    return root[0]


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """(list or object, index or key) of every value below a list of one, those of deep nesting apart."""
    found: list[tuple[Any, Any]] = []
    level: list[tuple[Any, Any]] = [(root, 0)]
    for _ in range(12):
        found += level
        inner = [holder[key] for holder, key in level]
        level = [(one, key) for one in inner if isinstance(one, dict) for key in one]
        level += [(one, index) for one in inner if isinstance(one, list) for index in range(len(one))]
    return found


def mutated_json(rng: random.Random, values: Sequence[Any]) -> bytes:
    """The text of one of the values, changed as a value, as bytes, or as both."""
    value = rng.choice(values)
    if rng.random() < 0.8:
        value = mutated_value(rng, value)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    for name, nest in NESTS.items():
        text = text.replace(f'"{name}"', nest)
    data = text.encode("utf-8", "surrogatepass")
    return data if rng.random() < 0.75 else mutated_bytes(rng, [data])


def mutated_lines(rng: random.Random, records: Sequence[Any]) -> bytes:
    """A few JSON lines, of which most are good."""
    lines = [json.dumps(rng.choice(records)).encode() for _ in range(rng.randrange(3))]
    if rng.random() < 0.9:
        lines.insert(rng.randrange(len(lines) + 1), mutated_json(rng, records))
    return b"\n".join(lines) + rng.choice((b"", b"\n", b"\r\n"))
