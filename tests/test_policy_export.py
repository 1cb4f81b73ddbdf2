"""The policy in Triton: its export, its decoding beside the project's, and the real bundled server."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from alignment.embedded import policy_folder
from alignment.errors import ConfigError
from alignment.launch import SOURCE_ROOT
from infra.triton_health import answers
from models.policy import Policy, load_policy
from models.policy_export import export_policy, main
from models.sampling import Sampling, draw
from reward_fixtures import export_tiny, served_repository, triton_module
from side_by_side import sample
from test_reward_serving import StandInError

MODEL = SOURCE_ROOT / "triton_repo" / "policy" / "1" / "model.py"
TYPES = {"prompt": "BYTES", "messages": "BYTES", "max_new_tokens": "INT32", "temperature": "FP32", "top_p": "FP32"}
KINDS = {"BYTES": np.object_, "INT32": np.int32, "FP32": np.float32, "INT64": np.int64}


def tiny(cache: Path, prompt_format: str = "text") -> Policy:
    return load_policy(policy_folder("tiny", cache), prompt_format=prompt_format)  # type: ignore[arg-type]


def export(policy: Policy, repository: Path, name: str = "policy", max_new_tokens: int = 40) -> str:
    return export_policy(policy, repository=repository, name=name, max_new_tokens=max_new_tokens, card={})[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A text policy, a chat policy and a reward model behind one real Triton."""
    folder = tmp_path_factory.mktemp("policies")
    repository = folder / "repository"
    texts, chats = (tiny(folder, form) for form in ("text", "chat"))
    export(texts, repository)
    export(chats, repository, name="chats")
    export_tiny(repository)
    with served_repository(repository) as server, triton.InferenceServerClient(server.url) as client:
        yield client, server, texts, chats


def ask(client: triton.InferenceServerClient, model: str = "policy", **values: Any) -> list[tuple[str, str, int]]:
    """Text, finish reason and number of tokens of each row; a single value is one row."""
    inputs = []
    for name, value in values.items():
        rows = value if isinstance(value, list) else [value]
        kind = TYPES.get(name, "INT64")
        tensor = triton.InferInput(name, [len(rows), 1], kind)
        rows = [row.encode() if isinstance(row, str) else row for row in rows]
        tensor.set_data_from_numpy(np.array(rows, dtype=KINDS[kind]).reshape(-1, 1))
        inputs.append(tensor)
    result = client.infer(model, inputs, client_timeout=60)
    columns = [result.as_numpy(name).reshape(-1) for name in ("text", "finish_reason", "num_tokens")]
    return [(text.decode(), reason.decode(), int(n)) for text, reason, n in zip(*columns, strict=True)]


def expected(policy: Policy, text: str, seed: int, sampling: Sampling) -> tuple[str, str, int]:
    """What the project's own decoding makes of the prompt with the same uniform numbers."""
    numbers = np.random.Generator(np.random.Philox(key=seed)).random(sampling.max_new_tokens)
    ids = policy.reader.encode(text)
    ((one,),) = sample(policy.model, [ids], torch.from_numpy(numbers)[None, None], sampling, eos_ids=policy.eos_ids)
    return policy.reader.decode(ids, one.token_ids), one.finish_reason, len(one.token_ids)


def test_a_response_is_the_one_that_a_rollout_would_be(place: Any) -> None:
    client, _, policy, _ = place
    for seed in range(6):
        own = expected(policy, "Movie review: this", seed, Sampling(30))
        assert ask(client, prompt="Movie review: this", seed=seed, max_new_tokens=30) == [own]
    cold = Sampling(12, temperature=0.5, top_p=0.7)
    assert ask(client, prompt="a", seed=3, max_new_tokens=12, temperature=0.5, top_p=0.7) == [
        expected(policy, "a", 3, cold)
    ]


def test_rows_of_one_request_and_of_many_do_not_disturb_each_other(place: Any) -> None:
    client, _, policy, _ = place
    rows = [(f"prompt {'x' * i}", i, Sampling(1 + 5 * i, temperature=0.4 + 0.2 * i)) for i in range(8)]
    together = ask(
        client,
        prompt=[text for text, _, _ in rows],
        seed=[seed for _, seed, _ in rows],
        max_new_tokens=[s.max_new_tokens for _, _, s in rows],
        temperature=[s.temperature for _, _, s in rows],
    )
    assert together == [expected(policy, text, seed, sampling) for text, seed, sampling in rows]
    assert {reason for _, reason, _ in together} <= {"stop", "length"}


def test_what_a_request_leaves_out(place: Any) -> None:
    client, _, policy, _ = place
    (one,) = ask(client, prompt="hello")
    assert one[1] == "stop" or one[2] == 40  # the longest response of the export
    assert len({ask(client, prompt="hello", max_new_tokens=20)[0][0] for _ in range(5)}) > 1  # a seed of its own each
    greedy = ask(client, prompt="hello", temperature=0.0, max_new_tokens=10)
    assert greedy == ask(client, prompt="hello", temperature=0.0, max_new_tokens=10)
    ids, likeliest = policy.reader.encode("hello"), []
    for _ in range(10):
        with torch.no_grad():
            likeliest.append(int(policy.model(torch.tensor([ids + likeliest])).logits[0, -1].argmax()))
        if likeliest[-1] in policy.eos_ids:
            break
    assert greedy[0][0] == policy.reader.decode(ids, likeliest) and greedy[0][2] == len(likeliest)


def test_a_chat_policy_reads_prompts_and_conversations_by_its_template(place: Any) -> None:
    client, _, _, policy = place
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    messages.append({"role": "user", "content": "how are you"})
    own = expected(
        policy,
        policy.reader.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        5,
        Sampling(20),
    )
    assert ask(client, "chats", messages=json.dumps(messages), seed=5, max_new_tokens=20) == [own]
    single = ask(client, "chats", messages=json.dumps(messages[:1]), seed=5, max_new_tokens=20)
    assert ask(client, "chats", prompt="hi", seed=5, max_new_tokens=20) == single
    assert single[0][0] != ask(client, prompt="hi", seed=5, max_new_tokens=20)[0][0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompt": b"\xff"}, "not UTF-8"),
        ({"prompt": ""}, "it has no tokens"),
        ({"prompt": "a", "messages": "[]"}, "give either prompt or messages"),
        ({"seed": 1}, "give either prompt or messages"),
        ({"messages": "[]"}, "must be a non-empty list"),
        ({"messages": "{"}, "not JSON"),
        ({"messages": '[{"role": 1}]'}, 'needs a "role" and a "content"'),
        ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "half a surrogate pair"),
        ({"prompt": "a", "max_new_tokens": 41}, r"max_new_tokens \(41\) must be from 1 to 40"),
        ({"prompt": "a", "max_new_tokens": 0}, r"max_new_tokens \(0\)"),
        ({"prompt": "x" * 250, "max_new_tokens": 10}, "250 tokens and max_new_tokens .10. exceed the model's 256"),
        ({"prompt": "x" * 256}, "exceed the model's 256"),
        ({"prompt": "x" * 262145}, "it has 262145 bytes, and this version reads at most 262144"),
        ({"messages": json.dumps([{"role": "user", "content": "a"}] * 2)}, "continues one text, send one message"),
        ({"prompt": "a", "temperature": -1.0}, "temperature"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "temperature": 2.0**-11}, r"temperature \(0\.00048828125\) .* or >= 0\.001"),
        ({"prompt": "a", "top_p": 0.0}, "top_p"),
        ({"prompt": "a", "seed": -1}, "seed"),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_with_its_reason(place: Any, values: dict[str, Any], said: str) -> None:
    with pytest.raises(InferenceServerException, match=said):
        ask(place[0], **values)


def test_temperatures_at_both_ends_are_served(place: Any) -> None:
    client, _, policy, _ = place
    for temperature in (0.001, 3e38):
        cold_or_hot = Sampling(12, temperature=temperature)
        assert ask(client, prompt="a", seed=3, max_new_tokens=12, temperature=temperature) == [
            expected(policy, "a", 3, cold_or_hot)
        ]


class StandInRequest(dict[str, list[Any]]):
    """Stands in for one of Triton's requests: its inputs, of a client that waits for it or has given up."""

    cancelled = False

    def is_cancelled(self) -> bool:
        return self.cancelled


def test_a_row_that_fails_and_a_client_that_has_given_up_cost_no_neighbour_its_answer() -> None:
    triton = ModuleType("triton_python_backend_utils")
    triton.TritonError, triton.InferenceResponse = StandInError, SimpleNamespace  # type: ignore[attr-defined]
    triton.Tensor = lambda _, values: values  # type: ignore[attr-defined]
    triton.get_input_tensor_by_name = lambda request, name: (  # type: ignore[attr-defined]
        SimpleNamespace(as_numpy=lambda: np.array(request[name])) if name in request else None
    )
    model = object.__new__(triton_module(MODEL, triton).TritonPythonModel)
    model.row = lambda values: values["prompt"]
    batches: list[list[str]] = []

    def decode(rows: list[str]) -> list[tuple[str, str, int]]:
        batches.append(rows)
        if "odd" in rows:
            raise IndexError("index out of range in self")  # torch's, on a CPU, for a token without weights
        return [(row.upper(), "stop", 1) for row in rows]

    model.decode = decode
    requests = [StandInRequest(prompt=prompts) for prompts in (["a", "b"], ["odd"], ["late"], ["c"])]
    requests[2].cancelled = True
    first, odd, late, last = model.execute(requests)
    assert first.output_tensors[0].ravel().tolist() == ["A", "B"]
    assert last.output_tensors[0].ravel().tolist() == ["C"]
    assert (odd.error.code, odd.error.text) == ("INTERNAL", "IndexError: index out of range in self")
    assert late.error.code == "CANCELLED"
    assert batches == [["a", "b", "odd", "c"], ["a", "b"], ["odd", "c"], ["odd"], ["c"]]


def test_all_kinds_of_models_of_a_repository_are_watched(place: Any) -> None:
    _, server, _, _ = place
    assert all(answers(server.url, name, 30.0) for name in ("policy", "chats", "reward_model"))
    assert not answers(server.url, "no_such_model", 5.0)
    served = server.log.read_text()
    assert "chats (version 1), policy (version 1), reward_model (version 1)" in served


@pytest.mark.parametrize("name", ["policy", "reward_model"])
def test_no_queue_policy_lets_a_free_model_idle(name: str) -> None:
    """With one Triton's batcher at times misses that the model is free (docs/architecture.md)."""
    text = (SOURCE_ROOT / "triton_repo" / name / "config.pbtxt").read_text()
    settings = [line for line in text.splitlines() if not line.startswith("#")]
    assert any(line.startswith("dynamic_batching {") for line in settings)
    assert not any("queue_policy" in line for line in settings)


@pytest.fixture(scope="module")
def served_code() -> ModuleType:
    return triton_module(MODEL)


def test_the_copied_draw_is_the_projects(served_code: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(64, 50, generator=generator) * 3, torch.rand(64, generator=generator)
    for temperature, top_p in ((1.0, 1.0), (0.3, 1.0), (1.7, 0.6), (1.0, 0.05)):
        ours, _ = draw(logits, uniforms, Sampling(1, temperature=temperature, top_p=top_p))
        columns = (torch.full((64,), value) for value in (temperature, top_p))
        assert torch.equal(served_code.draw(logits, uniforms, *columns), ours)
    mixed = served_code.draw(logits, uniforms, torch.tensor([0.0, 1.0] * 32), torch.ones(64))
    assert torch.equal(mixed[::2], logits[::2].argmax(-1))
    assert torch.equal(mixed[1::2], draw(logits[1::2], uniforms[1::2], Sampling(1))[0])


def test_an_export_holds_a_plain_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["tiny", "--repository", str(tmp_path / "r"), "--root", str(tmp_path), "--max-new-tokens", "9"]) == 0
    said = capsys.readouterr().out
    version = tmp_path / "r" / "policy" / "1"
    assert f"as {version} (prompts are read as chat" in said and f"vllm serve {version / 'weights'}" in said
    card, settings = (json.loads((version / f"{name}.json").read_text()) for name in ("card", "settings"))
    assert card["source_sha256"] == card["digest"]  # the weights as they were
    assert settings == {"max_new_tokens": 9, "context": 256, "add_special_tokens": False, "eos_ids": [1]}
    assert AutoTokenizer.from_pretrained(version / "weights").chat_template == (version / "template.jinja").read_text()
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (policy_folder("tiny", tmp_path / "cache"), version / "weights")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main(["tiny", "--repository", str(tmp_path / "r"), "--root", str(tmp_path)]) == 0
    assert (tmp_path / "r" / "policy" / "2" / "model.py").is_file()


def test_what_cannot_be_exported_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--repository", str(tmp_path / "r"), "--root", str(tmp_path)]
    assert main(["nothing", *where]) == 1
    assert "ModelError: the policy (nothing): no such model folder" in capsys.readouterr().err
    export_tiny(tmp_path / "r", name="taken")
    with pytest.raises(ConfigError, match=r"--name \(taken\): .* holds another kind of model"):
        export(tiny(tmp_path / "cache"), tmp_path / "r", name="taken")
    for length in (-1, 0, 256):
        said = rf"--max-new-tokens \({length}\) must be at least 1 and < the policy's context of 256 tokens: give the"
        with pytest.raises(ConfigError, match=said):
            export(tiny(tmp_path / "cache"), tmp_path / "r", max_new_tokens=length)
    assert not (tmp_path / "r" / "policy").exists()  # so that Triton finds no half a model
    with pytest.raises(SystemExit):
        main(["tiny", *where, "--name", "../elsewhere"])
