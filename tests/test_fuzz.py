"""Hostile input: it is read as it should be, or ends in one of the project's errors, and nothing else happens.

`make fuzz` reads all of it, some 30,000 inputs; here is a share of a few hundred. A finding can be made again by
`python tests/fuzz_process.py --only TARGET`, with the seed that it names.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignment.errors import DataError
from alignment.foreign_json import parse_json
from alignment.prompts import read_prompts
from flow_runs import ROOT
from fuzz_server import fuzz_grpc, fuzz_http
from reward_fixtures import ServedRewardModel

SEED = int(os.environ.get("FUZZ_SEED", "0"))
WHOLE = {"http": 1500, "grpc": 1500}


def read_files(share: float) -> list[dict[str, Any]]:
    """What a process of its own found, by target. Fails with the first findings."""
    command = [sys.executable, str(ROOT / "tests" / "fuzz_process.py"), "--share", str(share), "--seed", str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1800)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    findings = [finding for target in found for finding in target["findings"]]
    assert not findings, json.dumps(findings[:3], indent=1) + f"\n{len(findings)} findings"
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])  # a crash, of which no exception tells
    return found


def told(found: list[dict[str, Any]]) -> str:
    lines = [
        f"{t['target']:>18}: {t['inputs']} inputs, {t['read']} read, {t['refused']} refused, "
        f"at most {t['slowest_s']} s and {t['growth_mb']} MB"
        for t in found
    ]
    return "\n".join([*lines, f"{sum(t['inputs'] for t in found)} inputs in files"])


def test_a_share_of_hostile_files() -> None:
    found = read_files(0.015)
    assert sum(target["inputs"] for target in found) > 200


@pytest.mark.fuzz
def test_all_hostile_files(capsys: pytest.CaptureFixture[str]) -> None:
    found = read_files(1)
    with capsys.disabled():
        print(f"\n{told(found)}")
    assert sum(target["inputs"] for target in found) + sum(WHOLE.values()) > 10_000
    assert all(target["read"] and (target["refused"] or target["target"] == "lineage") for target in found), told(found)


def test_a_share_of_hostile_requests(served_reward_model: ServedRewardModel) -> None:
    assert fuzz_http(served_reward_model, 60, SEED)["400"]
    assert fuzz_grpc(served_reward_model, 60, SEED)["INVALID_ARGUMENT"]


@pytest.mark.fuzz
def test_all_hostile_requests(served_reward_model: ServedRewardModel, capsys: pytest.CaptureFixture[str]) -> None:
    http = fuzz_http(served_reward_model, WHOLE["http"], SEED)
    calls = fuzz_grpc(served_reward_model, WHOLE["grpc"], SEED)
    with capsys.disabled():
        print(f"\nHTTP: {dict(http)}\ngRPC: {dict(calls)}")
    assert http["200"] and http["400"] and calls["OK"] and calls["INVALID_ARGUMENT"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
KEYS = st.sampled_from(("text", "prompt", "messages", "chosen", "rejected", "id", "reference", "role", "content"))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=st.dictionaries(KEYS | st.text(), JSON_VALUES | st.text(min_size=1), max_size=5))
def test_any_json_record_is_a_prompt_or_an_error_of_its_line(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    try:
        [found] = read_prompts(str(path), tmp_path)
    except DataError as error:
        assert str(error).startswith(f"{path}") and "\n" not in str(error) and str(error).isprintable()
    else:
        assert found.prompt_id.isprintable() and found.messages[-1]["role"] == "user"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[" * 101 + b"]" * 101, "nests more than 100 levels deep"),
        (b"[" * 100_000, "nests more than 100 levels deep"),
        (b'["\\ud800"]', "surrogates not allowed"),
        (b'"\xff"', "invalid start byte"),
        (b"9" * 5000, "4300 digits"),
    ],
)
def test_json_of_no_sane_shape_is_refused(text: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_json_that_nests_as_deep_as_allowed_is_read() -> None:
    value = parse_json(b"[" * 100 + b"]" * 100)
    assert repr(value).count("[") == 100
