"""Contents of messages as lists of parts, for images and for templates that know no other form.

Some templates of models that take images (SmolVLM's, Idefics') read content as a list of parts and
nothing else; others read text where it is text. Which it is, trying tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

from osaurus_grpc.chat.control_tokens import Spliced
from osaurus_grpc.chat.types import JSON, Image, Message, Role

if TYPE_CHECKING:  # transformers takes a second to import, and callers bring the object
    from transformers import PreTrainedTokenizerBase

_TEXT = "probe_text"

_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, bool]] = WeakKeyDictionary()


def needs_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template shows contents only where they are lists; found out once for a tokenizer."""
    known = _known.get(tokenizer)
    if known is None or known[0] != template:
        apply_chat_template = cast("Callable[..., str]", tokenizer.apply_chat_template)

        def shows(content: JSON) -> bool:
            try:
                turns = [{"role": "user", "content": content}]
                return _TEXT in apply_chat_template(turns, chat_template=template, tokenize=False)
            except Exception:  # noqa: BLE001  a template is a program: it can raise anything
                return False

        is_list = not shows(_TEXT) and shows([{"type": "text", "text": _TEXT}])
        known = _known[tokenizer] = (template, is_list)
    return known[1]


def parts_of(message: Message) -> JSON:
    """A message's content as a list: its texts, and its images between them."""
    content, parts = message.content, list[JSON]()
    start = 0
    for image in message.images:
        end = len(content) - image.text_behind
        if end > start:
            parts.append({"type": "text", "text": _sliced(content, start, end)})
        parts.append({"type": "image"})
        start = end
    if start < len(content) or not parts:
        parts.append({"type": "text", "text": _sliced(content, start, len(content))})
    return parts


def images_behind_results(messages: Sequence[Message]) -> Sequence[Message]:
    """The conversation with the images of tools' results in what the user says next.

    Templates have a place for images in what a user says, and seldom in a result.
    """
    if not any(message.images and message.role is Role.TOOL for message in messages):
        return messages
    found: list[Message] = []
    held: list[Image] = []
    for message in messages:
        if message.role is Role.TOOL:
            held.extend(message.images)
            message = replace(message, images=())
        elif held:
            if message.role is not Role.USER:
                found.append(_shown(held))
            else:
                before = tuple(replace(image, text_behind=len(message.content)) for image in held)
                message = replace(message, images=(*before, *message.images))
            held = []
        found.append(message)
    return [*found, _shown(held)] if held else found


def _shown(images: Sequence[Image]) -> Message:
    return Message(Role.USER, "", images=tuple(replace(image, text_behind=0) for image in images))


def _sliced(text: str, start: int, end: int) -> str:
    """A part of a text in which the server's own pieces stay such."""
    if not isinstance(text, Spliced):
        return text[start:end]
    pieces: list[tuple[str, bool]] = []
    place = 0
    for piece, is_own in text.parts:
        inside = piece[max(start - place, 0) : max(end - place, 0)]
        if inside:
            pieces.append((inside, is_own))
        place += len(piece)
    return Spliced.of(pieces)
