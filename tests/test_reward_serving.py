"""What a served reward model does by its settings: one real Triton with a model for each way of serving."""

import copy
import functools
import json
import re
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from tritonclient.utils import InferenceServerException

from alignment.errors import ConfigError
from models.reward_export import export_version
from models.reward_model import forward_rows
from reward_fixtures import (
    MAX_TOKENS,
    ONE_DRAWS,
    ROOT,
    RunningServer,
    ServedRewardModel,
    byte_tokenizer,
    command_line,
    descendants,
    served_repository,
    tiny_reward_model,
    tiny_serving,
    triton_module,
)

MERGE_WEIGHTS = (0.5, -2.0, 1.25)
MEAN, STD = 1.5, 4.0
PAD = 0
LIMIT = 60


@functools.cache
def tiny_decoder() -> LlamaForSequenceClassification:
    """A two-layer Llama with one output whose padding id is its ending id, as in many chat models.

    Computes in float32, with weights that bfloat16 can hold.
    """
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        num_labels=1,
        bos_token_id=2,
        eos_token_id=PAD,
        pad_token_id=PAD,
    )
    with ONE_DRAWS, torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@functools.cache
def attributes_model() -> BertForSequenceClassification:
    """The tiny encoder with a head of three outputs."""
    model, _ = tiny_reward_model()
    with ONE_DRAWS, torch.random.fork_rng():
        torch.manual_seed(1)
        model.classifier = torch.nn.Linear(32, 3)
    model.num_labels = model.config.num_labels = 3
    return model.eval()


def decoder_reward(model: LlamaForSequenceClassification, ids: Sequence[int]) -> float:
    """The head's output at the last token of one text alone, whatever that token is."""
    with torch.inference_mode():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        return model.score(hidden[0, -1]).item()


def outputs(model: BertForSequenceClassification, ids: Sequence[int]) -> list[float]:
    """All outputs of one text alone."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].tolist()


def by_ids(*ids: int) -> bytes:
    return json.dumps({"input_ids": ids}).encode()


def by_text(text: str) -> bytes:
    return json.dumps([{"role": "user", "content": text}]).encode()


def ids_of(text: str) -> list[int]:
    """What the models read for `by_text(text)` when nothing is cut: [CLS], the rendered bytes, [SEP]."""
    return byte_tokenizer()(f"user: {text}\n")["input_ids"]


@dataclass(frozen=True)
class Served:
    """One model of a running server."""

    url: str
    metrics_url: str
    name: str

    def score(self, *conversations: bytes) -> list[float]:
        """One request. Raises InferenceServerException."""
        tensor = triton.InferInput("conversation", [len(conversations), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(conversations, dtype=np.object_).reshape(-1, 1))
        with triton.InferenceServerClient(self.url) as client:
            return client.infer(self.name, [tensor], client_timeout=60).as_numpy("reward").reshape(-1).tolist()

    def score_together(self, conversations: Sequence[bytes]) -> list[float]:
        """A request each, in flight together, so that the server batches them as it likes."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda c: self.score(c)[0], conversations))

    def refusal(self, *conversations: bytes) -> str:
        """The message of a request that must be refused as INVALID_ARGUMENT."""
        with pytest.raises(InferenceServerException) as caught:
            self.score(*conversations)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        return caught.value.message()

    def counter(self, name: str) -> float:
        """The model's counter."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as response:
            values = re.findall(rf'^{name}{{.*model="{self.name}".*}} ([\d.]+)$', response.read().decode(), re.M)
        assert values, f"no counter {name} of {self.name}"
        return sum(map(float, values))


@pytest.fixture
def cutting(served_reward_model: ServedRewardModel) -> Served:
    """The encoder with one output, served as it is by default."""
    return Served(served_reward_model.url, served_reward_model.metrics_url, served_reward_model.name)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with the models `strict` and `decoder`."""
    repository = tmp_path_factory.mktemp("serving") / "repository"
    strict = tiny_serving(
        over_long="refuse",
        max_tokens=LIMIT,
        merge_weights=MERGE_WEIGHTS,
        output="standardized",
        mean=MEAN,
        std=STD,
        instances=2,
    )
    # Stored in bfloat16, and yet float32 on a CPU, where all of device_map's "auto" ends up here.
    half, decoder = copy.deepcopy(tiny_decoder()).bfloat16(), tiny_serving(device_map="auto", dtype="weights")
    for name, model, serving in (("strict", attributes_model(), strict), ("decoder", half, decoder)):
        export_version(model, byte_tokenizer(), repository=repository, name=name, serving=serving, card={})
    with served_repository(repository) as running:
        yield running


@pytest.fixture
def strict(server: RunningServer) -> Served:
    """An encoder with three outputs: refuses over-long conversations, merges and standardizes. Two instances."""
    return Served(server.url, server.metrics_url, "strict")


@pytest.fixture
def decoder(server: RunningServer) -> Served:
    """A decoder whose padding id is its ending id."""
    return Served(server.url, server.metrics_url, "decoder")


def test_an_over_long_conversation_is_cut_from_the_left_and_counted(cutting):
    text = "".join(chr(ord("a") + i % 26) for i in range(200))
    before = cutting.counter("reward_conversations_cut_total")
    rewards = cutting.score(by_text("short"), by_text(text), by_text("x" + text))
    whole = ids_of(text)
    (expected,) = outputs(tiny_reward_model()[0], [whole[0], *whole[-MAX_TOKENS + 1 :]])
    assert rewards[1:] == pytest.approx([expected, expected], abs=1e-5)
    assert cutting.counter("reward_conversations_cut_total") - before == 2


def test_outputs_are_merged_and_standardized_by_the_stored_numbers(strict):
    def expected(text: str) -> float:
        a, b, c = outputs(attributes_model(), ids_of(text))
        return (0.5 * a - 2.0 * b + 1.25 * c - MEAN) / STD

    assert strict.score(by_text("a"), by_text("words")) == pytest.approx([expected("a"), expected("words")], abs=1e-5)


def test_an_over_long_conversation_is_refused_alone_and_counted(strict):
    fits, too_long = "x" * 51, "x" * 52
    assert (len(ids_of(fits)), len(ids_of(too_long))) == (LIMIT, LIMIT + 1)
    (alone,) = strict.score(by_text(fits))
    before = strict.counter("reward_requests_refused_total")
    with ThreadPoolExecutor(8) as pool:
        neighbours = [pool.submit(strict.score, by_text(fits)) for _ in range(7)]
        message = strict.refusal(by_text("short"), by_text(too_long))
        rewards = [neighbour.result()[0] for neighbour in neighbours]
    assert "conversation 1: it has 61 tokens, and this version reads at most 60 (max_tokens)" in message
    assert rewards == pytest.approx([alone] * 7, abs=1e-5)
    assert strict.counter("reward_requests_refused_total") - before == 1
    assert strict.counter("reward_conversations_cut_total") == 0


token_rows = st.lists(
    # The padding id is drawn often, also at the end.
    st.lists(st.one_of(st.just(PAD), st.integers(1, 259)), min_size=1, max_size=12),
    min_size=1,
    max_size=5,
)


@settings(max_examples=10, deadline=None)
@given(token_rows)
def test_a_decoder_reads_its_reward_at_the_last_token_whatever_it_is(rows):
    """In process: an independent look-up of the last position, row by row."""
    model = tiny_decoder()
    with torch.inference_mode():
        rewards = forward_rows(model, rows, torch.device("cpu"))[:, 0].tolist()
    assert rewards == pytest.approx([decoder_reward(model, row) for row in rows], abs=1e-5)
    assert model.config.pad_token_id == PAD


def test_transformers_alone_reads_past_a_text_that_ends_with_the_padding_id():
    """Why `forward_rows` and model.py choose the padding id by batch; when this fails they need not."""
    model, ids = tiny_decoder(), [5, 6, PAD]
    with torch.inference_mode():
        theirs = model(input_ids=torch.tensor([ids])).logits.item()
    assert theirs == pytest.approx(decoder_reward(model, ids[:2]), abs=1e-5)
    assert abs(theirs - decoder_reward(model, ids)) > 0.01


@pytest.mark.parametrize("name", ["cutting", "decoder"])
def test_scores_depend_neither_on_batch_mates_nor_on_order_nor_on_padding(request, name):
    """In one request, reversed, and as many requests in flight; every fourth text ends with the padding id."""
    served = request.getfixturevalue(name)
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, MAX_TOKENS, 4, 4, 4, 4, 60]
    rows = [torch.randint(1, 260, (n,), generator=generator).tolist() for n in lengths]
    rows = [[*row[:-1], PAD] if i % 4 == 0 else row for i, row in enumerate(rows)]
    if name == "decoder":
        expected = [decoder_reward(tiny_decoder(), row) for row in rows]
    else:
        expected = [outputs(tiny_reward_model()[0], row)[0] for row in rows]
    assert np.std(expected) > 0.05
    conversations = [by_ids(*row) for row in rows]
    assert served.score(*conversations) == pytest.approx(expected, abs=1e-5)
    assert served.score(*conversations[::-1])[::-1] == pytest.approx(expected, abs=1e-5)
    assert served.score_together(conversations * 3) == pytest.approx(expected * 3, abs=1e-5)


def test_token_ids_score_like_the_text_they_stand_for(decoder):
    """Both forms in one request; the special tokens are the sender's."""
    by_words, by_numbers = decoder.score(by_text("hello"), by_ids(*ids_of("hello")))
    assert by_numbers == pytest.approx(by_words, abs=1e-6)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "it has no tokens"),
        ([1] * (MAX_TOKENS + 1), f"it has {MAX_TOKENS + 1} tokens, and this version reads at most {MAX_TOKENS}"),
        ([5, 260], "input_ids has 260, and the vocabulary ends at 259"),
        ([-1], "input_ids has -1"),
        ([10**30], "input_ids has 1000000000"),
        ([1.0], "input_ids must be a list of integers"),
        ([True], "input_ids must be a list of integers"),
        ("12", "input_ids must be a list of integers"),
        (None, "input_ids must be a list of integers"),
    ],
)
def test_token_ids_that_cannot_be_read_are_refused_alone(decoder, ids, message):
    bad = json.dumps({"input_ids": ids}).encode()
    with ThreadPoolExecutor(4) as pool:
        neighbours = [pool.submit(decoder.score, by_ids(7, 8, 9)) for _ in range(3)]
        assert f"conversation 1: {message}" in decoder.refusal(by_ids(1), bad)
        rewards = [neighbour.result()[0] for neighbour in neighbours]
    assert rewards == pytest.approx([decoder_reward(tiny_decoder(), [7, 8, 9])] * 3, abs=1e-5)


@pytest.mark.parametrize("bad", [b"{}", b'{"input_ids": [1], "x": 1}', b'{"messages": []}', b"1" * 5000])
def test_other_forms_are_refused(decoder, bad):
    assert "conversation 0: " in decoder.refusal(bad)


def test_a_huge_conversation_is_refused_by_its_bytes(decoder):
    assert "conversation 0: it has 262145 bytes" in decoder.refusal(b"[" * 262_145)


def test_as_many_processes_as_instances_serve_a_model(server):
    lines = [command_line(pid) for pid in descendants(server.pid)]
    counts = {name: sum(f"/{name}/1/model.py" in line for line in lines) for name in ("strict", "decoder")}
    assert counts == {"strict": 2, "decoder": 1}


def test_settings_and_placement_are_written(tmp_path):
    """What Triton parses of it, the served tests show."""
    merged = tiny_serving(merge_weights=(1.0, 0.0, -0.5), mean=0.5, std=2.0, over_long="refuse", instances=3)
    whole = tiny_serving(device_map="auto", dtype="weights")
    for name, model, serving in (("merged", attributes_model(), merged), ("whole", tiny_decoder(), whole)):
        export_version(model, byte_tokenizer(), repository=tmp_path, name=name, serving=serving, card={})
    written = json.loads((tmp_path / "merged" / "1" / "settings.json").read_text())
    assert written == {
        "max_tokens": MAX_TOKENS,
        "token_budget": 512,
        "over_long": "refuse",
        "output": "raw",
        "mean": 0.5,
        "std": 2.0,
        "merge_weights": [1.0, 0.0, -0.5],
        "dtype": "float32",
        "device_map": None,
        "runtime": "torch",
    }
    assert "instance_group [ { kind: KIND_AUTO count: 3 } ]" in (tmp_path / "merged" / "config.pbtxt").read_text()
    assert "instance_group [ { kind: KIND_MODEL count: 1 } ]" in (tmp_path / "whole" / "config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_weights": (1.0, 2.0)}, r"reward_training\.merge_weights \(1, 2\) .*outputs, which are 1"),
        ({"output": "standardized", "std": 1.0}, r"reward\.output \(standardized\) .*held-out mean None"),
        ({"output": "standardized", "mean": 1.0}, r"reward\.output \(standardized\) .*held-out std None"),
        ({"output": "standardized", "mean": 1.0, "std": 0.0}, r"held-out std 0\.0"),
        ({"output": "standardized", "mean": float("nan"), "std": 1.0}, r"held-out mean nan"),
        ({"device_map": "auto", "instances": 2}, r"reward\.instances \(2\) must be 1 with reward\.device_map"),
        ({"instances": 0}, r"reward\.instances \(0\) must be >= 1"),
    ],
)
def test_settings_that_could_not_serve_are_refused_at_export(tmp_path, changes, message):
    model, tokenizer = tiny_reward_model()
    with pytest.raises(ConfigError, match=message):
        export_version(model, tokenizer, repository=tmp_path, name="m", serving=tiny_serving(**changes), card={})
    assert list(tmp_path.iterdir()) == []


class StandInError:
    """Stands in for Triton's error, which holds text that is UTF-8 and no other."""

    INVALID_ARG, INTERNAL, CANCELLED = "INVALID_ARG", "INTERNAL", "CANCELLED"

    def __init__(self, text: str, code: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TypeError("incompatible constructor arguments") from error
        self.text, self.code = text, code


@pytest.fixture(scope="module")
def served_code() -> ModuleType:
    """model.py as a module of this process, with stand-ins for Triton's classes."""
    triton = ModuleType("triton_python_backend_utils")
    triton.TritonError, triton.InferenceResponse = StandInError, SimpleNamespace
    triton.Tensor = lambda name, values: SimpleNamespace(name=name, values=values)
    triton.get_input_tensor_by_name = lambda request, _: SimpleNamespace(as_numpy=lambda: np.array(request, object))
    return triton_module(ROOT / "triton_repo" / "reward_model" / "1" / "model.py", triton)


class StandInRequest(list):
    """A request of conversations, of a client that waits for it or has given up."""

    cancelled = False

    def is_cancelled(self) -> bool:
        return self.cancelled


class StandInCounter:
    """Stands in for a Prometheus counter."""

    def __init__(self) -> None:
        self.value = 0

    def increment(self, by: int) -> None:
        self.value += by


@pytest.fixture
def in_process(served_code: ModuleType) -> Any:
    """A loaded model without weights: the reward of {"input_ids": ids} is their sum."""
    model = object.__new__(served_code.TritonPythonModel)
    model.settings = {"max_tokens": LIMIT, "over_long": "refuse", "token_budget": 512}
    model.template = served_code.compile_template("{{ raise_exception('role ' + messages[0].role) }}")
    model.tokenizer, model.vocabulary, model.pad_id, model.pass_tokens = byte_tokenizer(), 260, PAD, 24
    model.model = SimpleNamespace(config=LlamaConfig())
    model.forward = lambda input_ids, mask: (input_ids * mask).sum(1).float().numpy()
    names = ("tokens_real", "tokens_padded", "conversations_cut", "requests_refused")
    model.counters = {f"reward_{name}_total": StandInCounter() for name in names}
    return model


def execute(model: Any, *requests: list[bytes]) -> Any:
    return model.execute([StandInRequest(request) for request in requests])


def rewards_or_error(response: SimpleNamespace) -> Any:
    error = getattr(response, "error", None)
    return (error.code, error.text) if error else response.output_tensors[0].values.reshape(-1).tolist()


def test_an_error_that_quotes_half_a_surrogate_pair_is_one_requests_alone(in_process):
    bad = json.dumps([{"role": "\ud83d", "content": "x" * 2000}]).encode()
    answers = execute(in_process, [by_ids(1, 2)], [bad], [by_ids(3)])
    refused = "conversation 0: reward.template failed on it (TemplateError: role ?)"
    assert [rewards_or_error(a) for a in answers] == [[3.0], ("INVALID_ARG", refused), [3.0]]


def test_an_error_that_nobody_foresaw_is_one_requests_alone(in_process):
    def render(**_: Any) -> str:
        raise OSError("x" * 2000)

    in_process.template = SimpleNamespace(render=render)
    answers = execute(in_process, [by_ids(1, 2)], [by_text("a")], [by_ids(3)])
    assert [rewards_or_error(a) for a in answers] == [[3.0], ("INTERNAL", "OSError: " + "x" * 991), [3.0]]
    assert in_process.counters["reward_requests_refused_total"].value == 1


def test_a_forward_pass_that_fails_in_any_way_is_one_requests_alone(in_process):
    def forward(input_ids: Any, mask: Any) -> Any:
        if 7 in input_ids:
            raise IndexError("index out of range in self")  # torch's, on a CPU, for a token without weights
        return (input_ids * mask).sum(1).float().numpy()

    in_process.forward = forward
    answers = execute(in_process, [by_ids(1, 2)], [by_ids(4, 7)], [by_ids(3)])
    failed = ("INTERNAL", "conversation 0: IndexError: index out of range in self")
    assert [rewards_or_error(a) for a in answers] == [[3.0], failed, [3.0]]


def test_a_huge_conversation_is_refused_alone_before_it_is_read(in_process):
    longest = 1 << 18
    fits, huge = b"[" * longest, b"[" * (longest + 1)
    first, second, neighbour = execute(in_process, [fits], [by_ids(1), huge], [by_ids(3)])
    assert "conversation 0: not JSON" in rewards_or_error(first)[1]
    refused = "conversation 1: it has 262145 bytes, and this version reads at most 262144"
    assert rewards_or_error(second) == ("INVALID_ARG", refused)
    assert rewards_or_error(neighbour) == [3.0]
    assert in_process.counters["reward_requests_refused_total"].value == 2
    in_process.settings["max_tokens"] = 5000  # 64 bytes for each are more
    (longer,) = execute(in_process, [huge])
    assert "not JSON" in rewards_or_error(longer)[1]


def test_a_forward_pass_that_fails_fails_the_rows_that_it_fails_on_alone(in_process):
    """As a GPU without room for a whole micro-batch does, and then for one of its rows."""
    shapes = []

    def forward(input_ids, mask):
        shapes.append(tuple(input_ids.shape))
        if len(input_ids) > 1 or 9 in input_ids:
            raise RuntimeError(f"no room for {tuple(input_ids.shape)}")
        return (input_ids * mask).sum(1).float().numpy()

    in_process.forward = forward
    answers = execute(in_process, [by_ids(1, 2)], [by_ids(3), by_ids(9)], [by_ids(4), by_ids(5)])
    failed = ("INTERNAL", "conversation 1: RuntimeError: no room for (1, 1)")
    assert [rewards_or_error(a) for a in answers] == [[3.0], failed, [4.0, 5.0]]
    assert sorted(shapes) == [(1, 1)] * 4 + [(1, 2), (5, 2)]
    assert in_process.counters["reward_tokens_real_total"].value == 5


def test_a_reward_that_is_not_finite_is_not_another_rows_failure(in_process):
    def forward(input_ids, mask):
        if 9 in input_ids:
            raise RuntimeError("no room")
        return np.full(len(input_ids), np.nan, dtype=np.float32)

    in_process.forward = forward
    texts = [rewards_or_error(a)[1] for a in execute(in_process, [by_ids(9)], [by_ids(3)])]
    assert texts == ["conversation 0: RuntimeError: no room", "conversation 0: the model's output is not finite"]


def test_what_no_client_waits_for_is_not_computed(in_process):
    given_up = StandInRequest([by_ids(7, 8)])
    given_up.cancelled = True
    answers = in_process.execute([StandInRequest([by_ids(1, 2)]), given_up, StandInRequest([by_ids(3)])])
    assert [rewards_or_error(a) for a in answers] == [[3.0], ("CANCELLED", "its client has given up"), [3.0]]
    assert in_process.counters["reward_tokens_real_total"].value == 3
