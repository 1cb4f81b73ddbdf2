"""Demonstrations as tokens: what the loss counts, and that prompts read as they do when the policy is sampled."""

import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from alignment.demonstrations import read_demonstrations
from alignment.embedded import policy_folder
from alignment.errors import DataError
from alignment.types import Demonstration, Prompt
from models.policy import PromptReader, load_reader
from models.sequences import encode_demonstration

ROOT = Path(__file__).resolve().parent.parent
TRANSCRIPT = yaml.safe_load(re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "sft.md").read_text(), re.DOTALL)[1])
"""The template that the documentation offers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return policy_folder("tiny", tmp_path_factory.mktemp("cache"))


def chat(*contents, learned=None):
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))
    return Demonstration(messages, learned or tuple(i % 2 == 1 for i in range(len(contents))), "file:1")


def shown(reader, sequence):
    """The text with the counted tokens in brackets."""
    text, inside = "", False
    for token, counts in zip(sequence.ids, sequence.learned, strict=True):
        text += ("[" if counts and not inside else "]" if inside and not counts else "") + reader.tokenizer.decode(
            token
        )
        inside = counts
    return text + ("]" if inside else "")


def test_text_is_input_and_output_verbatim_and_the_ending_token(folder):
    reader = load_reader(folder, prompt_format="text")
    sequence = encode_demonstration(reader, chat("a b", " c"), (1,))
    assert shown(reader, sequence) == "a b[ c<|eos|>]"
    assert sequence.num_learned == 3
    with pytest.raises(DataError, match=r"file:1: 4 messages, but policy\.prompt_format \(text\) joins one input"):
        encode_demonstration(reader, chat("a", "b", "c", "d"), (1,))


def test_an_answer_to_nothing_is_refused_where_no_token_stands_before_it(folder):
    # Its first token could not be predicted, so it would go unlearned without a word.
    with pytest.raises(DataError, match="file:1: nothing stands before the answer"):
        encode_demonstration(load_reader(folder, prompt_format="text"), chat("", "b"), (1,))
    after_a_beginning_token = encode_demonstration(sub_word_reader(), chat("", "b"), (1,))
    assert after_a_beginning_token.learned == (False, True, True)


def test_a_chat_counts_answers_up_to_their_ending_tokens(folder):
    reader = load_reader(folder, prompt_format="chat")
    start, answer = "<|im_start|>user\n", "<|eos|>\n<|im_start|>assistant\n"
    sequence = encode_demonstration(reader, chat("a", "b", "c", "d"), (1,))
    assert shown(reader, sequence) == f"{start}a{answer}[b<|eos|>]\n{start}c{answer}[d<|eos|>]"
    only_last = chat("a", "b", "c", "d", learned=(False, False, False, True))
    assert shown(reader, encode_demonstration(reader, only_last, (1,))) == (
        f"{start}a{answer}b<|eos|>\n{start}c{answer}[d<|eos|>]"
    )


def test_what_stands_before_the_answer_is_the_prompt_of_rollouts(folder):
    for prompt_format in ("text", "chat"):
        reader = load_reader(folder, prompt_format=prompt_format)
        prompt = reader.encode(reader.text(Prompt("1", ({"role": "user", "content": "why?"},))))
        sequence = encode_demonstration(reader, chat("why?", "so"), (1,))
        assert list(sequence.ids[: len(prompt)]) == prompt
        assert sequence.learned == (*[False] * len(prompt), *[True] * (len(sequence.ids) - len(prompt)))


def test_a_template_without_ending_tokens_gets_one_behind_the_last_answer(folder):
    reader = with_template(folder, TRANSCRIPT["sft"]["chat_template"])
    sequence = encode_demonstration(reader, chat("a", "b", "c", "d"), (1,))
    assert shown(reader, sequence) == "\n\nHuman: a\n\nAssistant:[ b]\n\nHuman: c\n\nAssistant:[ d<|eos|>]"


def with_template(folder, template):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return PromptReader(tokenizer, "chat", 256)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_a_remedy(folder):
    # As reasoning models' templates do: what an earlier answer thought is taken out.
    rewriting = (
        "{% for m in messages %}{{ m.role[0] }}:{{ '?' if m.role == 'assistant' and loop.last else '' }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}a:?{% endif %}"
    )
    reader = with_template(folder, rewriting)
    with pytest.raises(DataError, match=r"file:1: the chat template writes the turns .*set sft\.turns=last"):
        encode_demonstration(reader, chat("a", "b", "c", "d"), (1,))
    only_last = chat("a", "b", "c", "d", learned=(False, False, False, True))
    assert shown(reader, encode_demonstration(reader, only_last, (1,))) == "u:aa:bu:ca:?[d<|eos|>]"
    with pytest.raises(DataError, match="file:1: the policy's chat template refuses it: no"):
        encode_demonstration(with_template(folder, "{{ raise_exception('no') }}"), chat("a", "b"), (1,))


def sub_word_reader():
    """Merges "gr", "ly" and, over the boundary of a prompt, "tl"; puts a beginning token before a text."""
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    symbols = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz ", "tl"]
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[("t", "l")]))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PromptReader(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), "text", None)


def test_no_token_spans_the_boundary_of_prompt_and_answer():
    reader = sub_word_reader()
    sequence = encode_demonstration(reader, chat("great", "ly at last"), (1,))
    assert reader.tokenizer.convert_ids_to_tokens(list(sequence.ids)) == [
        "<s>", *"great", *"ly at last", "</s>"
    ]  # fmt: skip
    assert sequence.num_learned == len("ly at last") + 1
    inside = encode_demonstration(reader, chat("a", "tl"), (1,))
    assert reader.tokenizer.convert_ids_to_tokens(list(inside.ids)) == ["<s>", "a", "tl", "</s>"]


def test_every_built_in_demonstration_can_be_encoded(folder, tmp_path):
    for prompt_format in ("text", "chat"):
        reader = load_reader(folder, prompt_format=prompt_format)
        for demonstration in read_demonstrations("toy:demonstrations", tmp_path)[0]:
            sequence = encode_demonstration(reader, demonstration, (1,))
            answer = demonstration.messages[-1]["content"]
            assert sequence.num_learned == len(answer.encode()) + 1 and sequence.ids[-1] == 1
