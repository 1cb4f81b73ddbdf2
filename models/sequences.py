"""A demonstration as token ids, with the tokens that the loss counts.

Rendered as the policy reads its prompts (see `models.policy.PromptReader`): in `text` format the input is followed by
the output verbatim and by the ending token; in `chat` format the tokenizer's template lays out the turns, and an
answer is what the template puts behind its generation prompt, up to the ending token.

What stands before an answer is tokenized as it will be when the policy is sampled: the boundary is never inside a
token. The text as a whole is tokenized where that does not move the boundary, since a SentencePiece tokenizer would
put a space before a piece that it is given alone.
"""

from collections.abc import Iterator, Sequence

from alignment.errors import DataError
from alignment.types import Demonstration, TokenSequence
from models.policy import PromptReader


def encode_demonstration(reader: PromptReader, demonstration: Demonstration, eos_ids: Sequence[int]) -> TokenSequence:
    """The demonstration's tokens. `eos_ids` are the tokens that end a response; the first is given to an answer
    that its template leaves without one. Raises DataError, naming the place, for what the format cannot express.
    """
    ids: list[int] = []
    learned: list[bool] = []
    text = ""
    for piece, is_learned in _pieces(reader, demonstration):
        text += piece
        whole = reader.encode(text)
        added = whole[len(ids) :] if whole[: len(ids)] == ids else reader.encode_more(piece)
        ends = [i for i, token in enumerate(added, start=1) if token in eos_ids]
        if is_learned and not ids:
            raise DataError(f"{demonstration.place}: nothing stands before the answer: give it a question")
        counted = (ends[-1] if ends else len(added)) if is_learned else 0
        ids += added
        learned += [i < counted for i in range(len(added))]
    last = len(learned) - learned[::-1].index(True) if any(learned) else 0
    if last == 0 or ids[last - 1] not in eos_ids:
        ids, learned, last = [*ids, eos_ids[0]], [*learned, True], len(ids) + 1
    return TokenSequence(tuple(ids[:last]), tuple(learned[:last]))


def _pieces(reader: PromptReader, demonstration: Demonstration) -> Iterator[tuple[str, bool]]:
    """The rendered text in pieces, each learned or not. Raises DataError naming the place."""
    messages, place = demonstration.messages, demonstration.place
    if reader.prompt_format == "text":
        if [message["role"] for message in messages] != ["user", "assistant"]:
            raise DataError(
                f"{place}: {len(messages)} messages, but policy.prompt_format (text) joins one input and one output: "
                "set policy.prompt_format=chat"
            )
        yield messages[0]["content"], False
        yield messages[1]["content"], True
        return
    text = ""
    for i, is_learned in enumerate(demonstration.learned):
        if not is_learned:
            continue
        before = reader.render(messages[:i], place, generation_prompt=True)
        after = reader.render(messages[: i + 1], place, generation_prompt=False)
        if not before.startswith(text) or not after.startswith(before):
            raise DataError(
                f"{place}: the chat template writes the turns before message {i} otherwise once it is there, so its "
                "answer cannot be told from them: set sft.turns=last, or give a plainer sft.chat_template"
            )
        yield before[len(text) :], False
        yield after[len(before) :], True
        text = after
