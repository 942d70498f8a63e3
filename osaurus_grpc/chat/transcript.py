"""The tokens of a conversation so far, carried over into its next turn.

A template writes a conversation anew with every turn, and tokenizing that gives the earlier answers
other tokens than the model chose when it wrote them: "Hel" "lo" comes back as "Hello". The text is
the same, but a KV cache is of tokens, and of the ones that were there. So where the new rendering
begins with the old one, only what is new is tokenized, and stands behind the old tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from osaurus_grpc.chat.control_tokens import Shield
from osaurus_grpc.chat.detokenize import Detokenizer, token_bytes
from osaurus_grpc.chat.template import Rendering

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase

# Characters; those of the models known are below half of it.
_LONGEST_CONTROL_TOKEN: Final = 128


@dataclass(frozen=True, slots=True)
class Transcript:
    """One turn: what the model read and what it wrote.

    Attributes:
        rendering: The conversation up to the answer, as text.
        prompt: The same as tokens.
        answer: Tokens of the answer, the end-of-sequence token not among them.
    """

    rendering: Rendering
    prompt: array[int]
    answer: array[int]

    @classmethod
    def of(cls, rendering: Rendering, prompt: Sequence[int], answer: Sequence[int]) -> Transcript:
        """A transcript in little memory."""
        return cls(rendering, array("I", prompt), array("I", answer))


def encode_after(
    transcript: Transcript | None, rendering: Rendering, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Tokenizes a rendered conversation, with the tokens of an earlier turn where it begins with that.

    Either way the tokens stand for the rendered text. The old prompt is taken over where its text
    begins the new one; the old answer too as far as the text goes on with it, but only to its end or
    to where the template ends the turn (it was cut by a stop text, or the template drops its
    reasoning or strips its spaces), so that no word is cut in two.

    Args:
        transcript: The earlier turn, by the same tokenizer; None tokenizes everything.
        rendering: The conversation now.
        tokenizer: The model's.

    Returns:
        Token ids, at least one.

    Raises:
        InvalidRequestError: As Rendering.encode().
    """
    if transcript is None:
        return rendering.encode()
    shield = rendering.shield
    before = shield.recut(transcript.rendering.text, transcript.rendering.shield)
    if not rendering.text.startswith(before):
        return rendering.encode()
    rest = rendering.text[len(before) :]
    count, length = _kept_answer(transcript, rest, shield, tokenizer)
    if not count and _is_within_word(rendering.text, len(before)):
        return rendering.encode()
    return [*transcript.prompt, *transcript.answer[:count], *shield.encode_rest(rest[length:])]


def _kept_answer(
    transcript: Transcript, rest: str, shield: Shield, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """How many tokens of the answer the rest of a text begins with, and their length in it."""
    answer = transcript.answer
    # SentencePiece drops a space at a text's start; a template may write it or not.
    for context in (transcript.prompt[-1:], array("I")):
        count = length = position = 0
        for index, text in enumerate(_texts(tokenizer, answer, context), start=1):
            if not rest.startswith(text, position):
                break
            position += len(text)
            is_whole = index == len(answer) and not _is_within_word(rest, position)
            following = rest[position : position + _LONGEST_CONTROL_TOKEN]
            if not (is_whole or shield.is_control_token_next(following)):
                continue
            # Other bytes at the end are those of a character that may not come.
            data = token_bytes(tokenizer, answer[index - 1])
            if rest[max(position - len(data), 0) : position].encode().endswith(data):
                count, length = index, position
        if count:
            return count, length
    return 0, 0


def _is_within_word(text: str, position: int) -> bool:
    return text[max(position - 1, 0) : position].isalnum() and text[position : position + 1].isalnum()


def _texts(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], context: Sequence[int]
) -> Iterator[str]:
    """The text that each token completes, control tokens by their names."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False, context=context)
    last = len(token_ids) - 1
    for index, token_id in enumerate(token_ids):
        text = detokenizer.step(token_id)
        yield text + detokenizer.finish() if index == last else text
