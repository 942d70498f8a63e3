"""Log-probabilities in the shape of the legacy text completions."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from osaurus_grpc.v1 import sampling_pb2


class LegacyLogprobs:
    r"""The log-probabilities of one choice, piece by piece.

    Offsets count characters of the choice's text from its beginning, through all pieces. A token that is
    no whole characters is shown as "bytes:\xNN...", as OpenAI's server shows it.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        # Characters of the last token's text that are still to come.
        self._owed = 0
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def take_prompt(self, tokens: Iterable[sampling_pb2.PromptTokenLogprob], text: str) -> str:
        """The tokens of a prompt that the choice's text begins with; the first has no log-probability.

        What the tokenizer put there by itself, such as a token for the beginning or a space before the
        first word, has no place in the text.

        Returns:
            The rest of the text, behind the prompt.
        """
        for token in tokens:
            shown = self._decoder.decode(token.token)
            length = len(shown)
            if not text.startswith(shown, self._offset):
                is_led = self._offset == 0 and shown[:1] == " " and text.startswith(shown[1:])
                length = len(shown) - 1 if is_led else 0
            known = token.HasField("logprob")
            own = sampling_pb2.TokenLogprob(token=token.token, logprob=token.logprob)
            self._add(
                token.token, token.logprob if known else None, (*token.top, own) if known else (), length
            )
        return text[self._offset :]

    def take(self, tokens: Iterable[sampling_pb2.ChosenTokenLogprob], text: str) -> None:
        """The next tokens of the answer, and the text that came with them.

        A token comes with the first character of its text, the rest of which may be held back.
        """
        place = self._owed
        for token in tokens:
            length = _length_in(text, place, self._decoder.decode(token.chosen.token))
            # The chosen token is there even where it is not among the most probable ones.
            self._add(token.chosen.token, token.chosen.logprob, (*token.top, token.chosen), length)
            place += length
        self._offset += max(0, len(text) - place)
        self._owed = max(0, place - len(text))

    def told(self) -> dict[str, object]:
        """What was taken since it was last told."""
        told: dict[str, object] = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._tops,
            "text_offset": self._offsets,
        }
        self._tokens, self._logprobs, self._tops, self._offsets = [], [], [], []
        return told

    def _add(
        self, token: bytes, logprob: float | None, top: Sequence[sampling_pb2.TokenLogprob], length: int
    ) -> None:
        self._tokens.append(_token_text(token))
        self._logprobs.append(logprob)
        self._tops.append({_token_text(entry.token): entry.logprob for entry in top} if top else None)
        self._offsets.append(self._offset)
        self._offset += length


def _length_in(text: str, place: int, shown: str) -> int:
    """Characters that a token has in a text from a place on: none where the text leaves its name out.

    Control tokens are left out. Of broken characters, the text may show another number of marks.
    """
    rest = len(text) - place
    is_there = text.startswith(shown, place) or (0 < rest < len(shown) and shown.startswith(text[place:]))
    return len(shown) if is_there or "\ufffd" in shown else 0


def _token_text(token: bytes) -> str:
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
