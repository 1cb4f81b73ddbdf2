"""The reward model in process: text to tokens, training, accuracy, export."""

import hashlib
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignment.config_sections import RunSection
from alignment.errors import ConfigError, DiskError, ModelError
from alignment.reward_repository import local_repository
from models.reward_export import Serving, claim_version, complete_versions, export_version, find_version, read_version
from models.reward_model import encode, load_reward_model, micro_batches, render, score_texts
from reward_fixtures import MAX_TOKENS, TEMPLATE, export_tiny, tiny_reward_model, triton_module

CLS, SEP = 2, 3
MESSAGES = [{"role": "user", "content": "Wie geht's? <b>\n"}, {"role": "assistant", "content": "gut 🙂 {{ 1 }}"}]


@pytest.fixture(scope="module")
def served_code() -> ModuleType:
    """triton_repo's model.py as a module; Triton's own module, absent here, is an empty stand-in."""
    return triton_module(Path(__file__).resolve().parent.parent / "triton_repo" / "reward_model" / "1" / "model.py")


def test_render_joins_messages_without_escaping():
    assert render(TEMPLATE, MESSAGES) == "user: Wie geht's? <b>\n\nassistant: gut 🙂 {{ 1 }}\n"


@pytest.mark.parametrize(
    "template", ["{{ m.contnet }}", "{% for m in %}", "{{ messages[0].content + 1 }}", "{{ 1/0 }}"]
)
def test_render_refuses_a_bad_template_by_its_key(template):
    with pytest.raises(ConfigError, match=r"reward\.template"):
        render(template, MESSAGES)


def test_render_gives_a_template_no_way_out():
    with pytest.raises(ConfigError, match=r"reward\.template"):
        render("{{ ''.__class__.__mro__[1].__subclasses__() }}", MESSAGES)


def test_encode_truncates_the_start_and_keeps_special_tokens():
    _, tokenizer = tiny_reward_model()
    (whole,) = encode(tokenizer, ["abcdef"], 8)
    (cut,) = encode(tokenizer, ["abcdef"], 5)
    assert whole[0] == CLS and whole[-1] == SEP and len(whole) == 8
    assert cut == [CLS, *whole[4:7], SEP]
    assert tokenizer.decode(cut[1:-1]) == "def"


def test_encode_does_not_double_special_tokens():
    _, tokenizer = tiny_reward_model()
    plain = encode(tokenizer, ["abcdef"], 20)
    assert encode(tokenizer, ["[CLS]abcdef[SEP]"], 20) == plain
    assert encode(tokenizer, ["[CLS]abcdef[SEP]"], 5) == encode(tokenizer, ["abcdef"], 5)


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "[CLS]{% for m in messages %}\n  {% if m.role == 'user' %}\nQ {{ m['content'] | trim }}\n{% endif %}\n"
        "{% endfor %}[SEP]\n\n",
    ],
)
def test_the_served_copies_of_render_and_encode_agree(served_code, template):
    _, tokenizer = tiny_reward_model()
    compiled = served_code.compile_template(template)
    for messages in (MESSAGES, MESSAGES[:1], [{"role": "user", "content": "x" * 300}]):
        text = render(template, messages)
        assert served_code.render(compiled, messages) == text
        for max_tokens in (5, MAX_TOKENS):
            assert [served_code.encode(tokenizer, text, max_tokens)] == encode(tokenizer, [text], max_tokens)


def test_micro_batches_by_hand():
    # By length: 1 3 3 | 5 | 9 | 20. Three rows of 3 are 9 tokens; a fourth of 5 would be 20.
    assert micro_batches([5, 1, 9, 3, 3, 20], token_budget=10, pass_tokens=5) == [[1, 3, 4], [0], [2], [5]]
    # A pass that costs nothing pays for no padding; one that costs much, for any that fits the budget.
    assert micro_batches([1, 3, 3], token_budget=10, pass_tokens=0) == [[0], [1, 2]]
    assert micro_batches([1, 3, 3], token_budget=10, pass_tokens=3) == [[0, 1, 2]]
    assert micro_batches([], token_budget=10, pass_tokens=1) == []


@given(st.lists(st.integers(1, 40), max_size=7), st.integers(1, 80), st.integers(0, 60))
def test_micro_batches_cost_as_little_as_any_within_the_budget(served_code, lengths, token_budget, pass_tokens):
    found = micro_batches(lengths, token_budget, pass_tokens)
    assert found == served_code.micro_batches(lengths, token_budget, pass_tokens)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))

    def cost(batches):
        if any(len(rows) > 1 and len(rows) * max(rows) > token_budget for rows in batches):
            return float("inf")
        return sum(len(rows) * max(rows) + pass_tokens for rows in batches)

    rows, ways = sorted(lengths), []
    for cuts in itertools.product([False, True], repeat=max(0, len(rows) - 1)):
        edges = [0, *(i for i, cut in enumerate(cuts, 1) if cut), len(rows)]
        ways.append([rows[a:b] for a, b in itertools.pairwise(edges) if a < b])
    assert cost([[lengths[i] for i in batch] for batch in found]) == min(map(cost, ways))


def test_scores_do_not_depend_on_batch_order_or_padding():
    model, tokenizer = tiny_reward_model()
    texts = ["a", "some words", "x" * 90, "", "ümläut"]
    together = score_texts(model, tokenizer, texts, max_tokens=MAX_TOKENS)
    alone = []
    for text in texts:
        with torch.inference_mode():
            alone.append(model(**tokenizer(text, return_tensors="pt")).logits.item())
    assert together == pytest.approx(alone, abs=1e-5)
    assert score_texts(model, tokenizer, texts[::-1], max_tokens=MAX_TOKENS) == pytest.approx(alone[::-1], abs=1e-5)
    assert max(alone) - min(alone) > 0.1


def save(folder: Path, labels: int = 1, headless: bool = False) -> str:
    model, tokenizer = tiny_reward_model()
    if labels != 1:
        model.classifier = torch.nn.Linear(32, labels)
        model.config.num_labels = labels
    (model.bert if headless else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_saved_model_loads_with_its_head(tmp_path):
    model, tokenizer = load_reward_model(save(tmp_path), require_head=True)
    original, original_tokenizer = tiny_reward_model()
    assert score_texts(model, tokenizer, ["abc"], max_tokens=20) == score_texts(
        original, original_tokenizer, ["abc"], max_tokens=20
    )


def test_a_new_head_is_given_by_the_seed_and_said_in_silence(tmp_path, capfd):
    source = save(tmp_path, headless=True)
    heads = [load_reward_model(source, seed=seed)[0].classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    out, err = capfd.readouterr()
    assert "classifier" not in out + err and "Loading" not in out + err
    with pytest.raises(ModelError, match=r"no trained head \(missing .*classifier\.weight.*reward_training\.train"):
        load_reward_model(source, require_head=True)


def test_models_that_cannot_be_reward_models_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"reward\.model \(/no/such/folder\): no such folder"):
        load_reward_model("/no/such/folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_reward_model(str(tmp_path / "empty"))
    two = save(tmp_path / "two", labels=2)
    with pytest.raises(ModelError, match="with 1 outputs"):
        load_reward_model(two, require_head=True)
    assert load_reward_model(two)[0].classifier.out_features == 1  # to be trained
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    (tmp_path / "two" / "config.json").write_text(json.dumps({**config, "vocab_size": 11}))
    with pytest.raises(ModelError, match=r"not those of its config\.json: .*word_embeddings"):
        load_reward_model(two)


def test_an_export_is_whole_and_loads_as_a_plain_model(tmp_path):
    version = export_tiny(tmp_path, name="helpful", recipe_digest="r1", accuracy=0.75)
    ref = read_version(tmp_path, "helpful", version)
    folder = tmp_path / "helpful" / "1"
    weights = folder / "weights"
    assert (ref.name, ref.version, ref.accuracy, ref.repository) == ("helpful", "1", 0.75, str(tmp_path))
    assert ref.digest == hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((folder / "card.json").read_text())["digest"] == ref.digest
    settings = json.loads((folder / "settings.json").read_text())
    assert (settings["max_tokens"], settings["token_budget"], settings["over_long"]) == (MAX_TOKENS, 512, "cut")
    assert (folder / "template.jinja").read_text() == TEMPLATE
    assert 'name: "helpful"' in (tmp_path / "helpful" / "config.pbtxt").read_text()
    assert sorted(p.name for p in (tmp_path / "helpful").iterdir()) == [".claims", "1", "config.pbtxt"]

    model, tokenizer = tiny_reward_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(weights)
    batch = AutoTokenizer.from_pretrained(weights)("abc", return_tensors="pt")
    with torch.inference_mode():
        reward = loaded.eval()(**batch).logits.item()
    assert reward == pytest.approx(score_texts(model, tokenizer, ["abc"], max_tokens=20)[0], abs=1e-6)


def test_a_version_is_found_by_its_recipe_and_the_newest_wins(tmp_path):
    assert find_version(tmp_path, "reward_model", "r1") is None
    for recipe in ("r1", "r2", "r1"):
        export_tiny(tmp_path, recipe_digest=recipe)
    found = find_version(tmp_path, "reward_model", "r1")
    assert found is not None and found.version == "3"
    assert find_version(tmp_path, "reward_model", "r3") is None


def test_exporters_side_by_side_get_different_versions(tmp_path):
    (tmp_path / "claims").mkdir()
    with ThreadPoolExecutor(8) as pool:
        # Many, for the moment between looking and taking is short.
        assert len(set(pool.map(lambda _: claim_version(tmp_path / "claims"), range(400)))) == 400
        versions = list(pool.map(lambda seed: export_tiny(tmp_path, seed=seed), range(6)))
    assert sorted(versions) == ["1", "2", "3", "4", "5", "6"]
    assert complete_versions(tmp_path, "reward_model") == sorted(versions)
    assert len({read_version(tmp_path, "reward_model", v).digest for v in versions}) == 6


@pytest.mark.parametrize("name", ["template.jinja", "settings.json", "model.py", "weights/config.json"])
def test_whatever_else_a_version_is_served_from_is_refused_when_damaged(tmp_path, name):
    export_tiny(tmp_path)
    path = tmp_path / "reward_model" / "1" / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ModelError, match=rf"{name} is missing or not what card.json says: .* put it back"):
        read_version(tmp_path, "reward_model", "1")


@pytest.mark.parametrize("name", ["template.jinja", "settings.json", "model.py", "weights/model.safetensors"])
def test_a_run_serves_no_version_with_a_file_cut_off(tmp_path, name):
    export_tiny(tmp_path)
    path = tmp_path / "reward_model" / "1" / name
    with local_repository(str(tmp_path), [("reward_model", "1")], RunSection()) as found:
        assert found == tmp_path
    path.write_bytes(path.read_bytes()[:-2])
    with (
        pytest.raises(ModelError, match=rf"{path} .*put it back from a copy"),
        local_repository(str(tmp_path), [("reward_model", "1")], RunSection()),
    ):
        pytest.fail("it would be served")


def test_damaged_weights_are_refused_by_name(tmp_path):
    export_tiny(tmp_path, recipe_digest="r1")
    path = tmp_path / "reward_model" / "1" / "weights" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="damaged or were changed"):
        read_version(tmp_path, "reward_model", "1")
    with pytest.raises(ModelError, match="damaged or were changed"):
        find_version(tmp_path, "reward_model", "r1")
    with pytest.raises(ModelError, match=r"reward\.version \(7\).*versions there: 1"):
        read_version(tmp_path, "reward_model", "7")


def test_an_edited_config_is_kept(tmp_path):
    export_tiny(tmp_path)
    config = tmp_path / "reward_model" / "config.pbtxt"
    config.write_text(config.read_text() + "# tuned\n")
    export_tiny(tmp_path)
    assert config.read_text().endswith("# tuned\n")


def test_a_failed_export_leaves_no_version(tmp_path):
    model, tokenizer = tiny_reward_model()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    tokenizer.save_pretrained = full_disk
    serving = Serving(template=TEMPLATE, max_tokens=8, token_budget=8)
    with pytest.raises(DiskError, match=r"No space left on device; free some space"):
        export_version(model, tokenizer, repository=tmp_path, name="m", serving=serving, card={})
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [".claims", "config.pbtxt"]
    assert complete_versions(tmp_path, "m") == []


def test_an_export_that_could_not_serve_is_refused(tmp_path):
    model, tokenizer = tiny_reward_model()
    arguments = {"repository": tmp_path, "name": "m", "card": {}}
    for said, template, length in (
        (r"reward\.max_tokens \(129\) must be <= 128", TEMPLATE, 129),
        (r"reward\.template", "{{ x }}", 8),
    ):
        with pytest.raises(ConfigError, match=said):
            serving = Serving(template=template, max_tokens=length, token_budget=8)
            export_version(model, tokenizer, serving=serving, **arguments)
    assert list(tmp_path.iterdir()) == []
