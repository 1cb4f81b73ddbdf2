"""What the fuzzing reads: each target has good inputs, a way to damage them, and the product's own reader.

Here are files of data and configs; `fuzz_run_targets` has what a run leaves, `fuzz_model_targets` weights and models.
"""

import contextlib
import gzip
import io
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config import load_config
from alignment.demonstrations import read_demonstrations
from alignment.preferences import read_pairs
from alignment.prompts import read_prompts
from alignment.ratings import read_ratings
from alignment.scaling import _parser, settings
from fuzz_mutations import TOKENS, mutated_bytes, mutated_json, mutated_lines

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"
YAML_TOKENS = (
    *TOKENS,
    *(b"&a [*a]", b"*a", b"&b ", b"<<: ", b"? ", b"- ", b"| ", b"> ", b": ", b"!!set ", b"!!map a", b"!!omap ["),
    *(b'!!python/object/apply:os.system ["touch executed"]', b"!!python/name:os.system ", b"!x ", b"---\n"),
    *(b"2001-99-99", b"0b_", b"0x_", b"1:2:99", b"!!timestamp a", b"!!int a", b"!!float a", b"!!bool a", b"!!binary a"),
    *(b".inf", b"-.nan", b"1e400", b"~", b"yes", b"\n  ", b"\n", b"a.b", b"9" * 400, b"{{", b"[" * 400),
)  # fmt: skip
OVERRIDES = (
    *(b"training.lr=1e-5", b"seed=3", b"run={root: x}", b"phases.rollouts.gpu=1", b"sft.train={toy:demonstrations: 1}"),
    *(b"kubernetes.node_selector={a: b}", b"rollouts.stop=[a, b]", b"reward.template='{{ messages }}'", b"a.b.c.d=1"),
    *(b"loop.max_time_per_run='00:01:00:00'", b"reward_ensemble.members={a/1: 2}", b"resume.from=1"),
)  # fmt: skip
PROMPTS: tuple[Any, ...] = (
    {"text": "a b", "id": "one"},
    {"prompt": "a", "reference": "b", "id": 3},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
)
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIRS: tuple[Any, ...] = (
    PROMPTS[3],
    {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "c"}], "prompt": "a", "margin": 1},
    {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2.5, "score_rejected": 1},
    {"text": "\n\nHuman: a\n\nAssistant: b"},
)
RATINGS: tuple[Any, ...] = (
    {"messages": MESSAGES, "ratings": {"good": 4, "long": None}},
    {"prompt": "a", "response": "b", "label": [4, -100]},
    {"text": "\n\nHuman: a\n\nAssistant: b", "label": [1, 2.5]},
)
DEMONSTRATIONS: tuple[Any, ...] = (
    {"input": "a", "output": "b"},
    {"messages": MESSAGES},
    {"system": "s", "mask": "User", "conversations": [{"from": "User", "value": "a"}, {"from": "gpt", "value": "b"}]},
    PAIRS[1],
)


@dataclass(frozen=True)
class Target:
    """`inputs` are how many of the whole 10,000 and more are its; `read` gets an input and an own folder."""

    name: str
    inputs: int
    make: Callable[[random.Random], bytes]
    read: Callable[[bytes, Path], object]


def jsonl(name: str, inputs: int, records: Sequence[Any], read: Callable[[str, Path], object]) -> list[Target]:
    """A reader of JSON lines, as they are and compressed."""

    def read_file(suffix: str) -> Callable[[bytes, Path], object]:
        def from_file(data: bytes, folder: Path) -> object:
            (folder / f"file{suffix}").write_bytes(data)
            return read(str(folder / f"file{suffix}"), folder)

        return from_file

    def compressed(rng: random.Random) -> bytes:
        data = gzip.compress(mutated_lines(rng, records), 1, mtime=0)
        return mutated_bytes(rng, [data]) if rng.random() < 0.7 else data

    return [
        Target(name, inputs, lambda rng: mutated_lines(rng, records), read_file(".jsonl")),
        Target(f"{name}.gz", inputs // 4, compressed, read_file(".jsonl.gz")),
    ]


def data_targets() -> list[Target]:
    """Files of prompts, pairs, ratings and demonstrations."""
    return [
        *jsonl("prompts", 2000, PROMPTS, lambda path, cache: read_prompts(path, cache, lambda *_: None)),
        *jsonl("preferences", 2000, PAIRS, read_pairs),
        *jsonl("ratings", 1500, RATINGS, lambda path, cache: read_ratings(path, cache, ["good", "long"])),
        *jsonl("demonstrations", 1500, DEMONSTRATIONS, read_demonstrations),
    ]


def config_targets() -> list[Target]:
    """Presets as YAML and JSON, overrides, and the simulator's costs."""
    presets = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    resolved = load_config(SMOKE).model_dump(mode="json")
    smaller = [{section: resolved[section]} for section in resolved]

    def preset(rng: random.Random) -> bytes:
        return (
            mutated_bytes(rng, presets, YAML_TOKENS) if rng.random() < 0.5 else mutated_json(rng, [resolved, *smaller])
        )

    def read_preset(data: bytes, folder: Path) -> object:
        (folder / "preset.yaml").write_bytes(data)
        return load_config(folder / "preset.yaml")

    def read_costs(data: bytes, folder: Path) -> object:
        (folder / "costs.yaml").write_bytes(data)
        return settings(_parser().parse_args(["--costs", str(folder / "costs.yaml")]))

    return [
        Target("preset", 3000, preset, read_preset),
        Target(
            "override",
            4000,
            lambda rng: mutated_bytes(rng, OVERRIDES, YAML_TOKENS),
            lambda data, _: load_config(SMOKE, [data.decode("utf-8", "surrogateescape").replace("\0", "")]),
        ),
        Target(
            "costs",
            200,
            lambda rng: mutated_bytes(rng, [b"costs: {update_share: 0.4}\nhardware:\n  node: 8\n"], YAML_TOKENS),
            read_costs,
        ),
    ]


def copy_once(source: Path, place: Path) -> Path:
    """A copy that later inputs of the same target find again."""
    if not place.exists():
        shutil.copytree(source, place)
    return place


def said(action: Callable[[], object]) -> object:
    """What the action returns, unless it prints a traceback."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        result = action()
    assert "Traceback" not in out.getvalue()
    out.getvalue().encode("utf-8")
    return result
