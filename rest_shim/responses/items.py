"""The items of a Responses conversation: messages, calls, their results, reasoning.

What a client sends as input, what an answer's output holds and what is stored between the two have
the same forms, so one schema reads them all.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, TypeAdapter

from rest_shim.bodies import TAG_PREFIX, UNKNOWN_VARIANT, Body
from rest_shim.remote_images import ImageReference, is_remote

MAX_ITEMS = 16_384
MAX_PARTS = 4_096

Status = Literal["in_progress", "completed", "incomplete"]
CallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class TextPart(Body):
    """Text, said by anyone; clients name it by who said it."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class RefusalPart(Body):
    """What the assistant said when it declined."""

    type: Literal["refusal"]
    refusal: str


class ImagePart(ImageReference):
    """An image: a data: URL, or where that is allowed, a remote one."""

    type: Literal["input_image"]
    image_url: str
    detail: str = "auto"

    @property
    def remote_url(self) -> str:
        """As ImageReference says."""
        return self.image_url if is_remote(self.image_url) else ""

    @property
    def url_path(self) -> str:
        """As ImageReference says."""
        return ".image_url"

    def holding(self, kind: str, encoded: str) -> ImagePart:
        """As ImageReference says."""
        return self.model_copy(update={"image_url": f"data:{kind};base64,{encoded}"})


_PART_TAGS = {
    "input_text": "~text",
    "output_text": "~text",
    "text": "~text",
    "refusal": "~refusal",
    "input_image": "~image",
}


def _part_tag(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return _PART_TAGS.get(kind) if isinstance(kind, str) else None


Part = Annotated[
    Annotated[TextPart, Tag("~text")]
    | Annotated[RefusalPart, Tag("~refusal")]
    | Annotated[ImagePart, Tag("~image")],
    Discriminator(
        _part_tag,
        custom_error_type=UNKNOWN_VARIANT,
        custom_error_message="A content part must be an object with the type 'input_text', 'output_text', "
        "'refusal' or 'input_image'",
    ),
]


def _parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "input_text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of content parts")
    return value


_PartList = Annotated[list[Part], Field(max_length=MAX_PARTS)]
Parts = Annotated[_PartList, BeforeValidator(_parts, json_schema_input_type=str | _PartList)]


class MessageItem(Body):
    """A turn of the conversation."""

    type: Literal["message"] = "message"
    id: str = ""
    role: Literal["system", "developer", "user", "assistant"]
    content: Parts
    status: Status = "completed"


class FunctionCallItem(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    id: str = ""
    call_id: CallId
    name: str
    arguments: str
    status: Status = "completed"


class FunctionOutputItem(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    id: str = ""
    call_id: CallId
    output: Parts
    status: Status = "completed"


class ReasoningText(Body):
    """A piece of reasoning or of its summary."""

    type: Literal["reasoning_text", "summary_text", "text"]
    text: str


class ReasoningItem(Body):
    """What the model thought before it answered."""

    type: Literal["reasoning"]
    id: str = ""
    summary: list[ReasoningText] = Field(default_factory=list, max_length=MAX_PARTS)
    content: list[ReasoningText] = Field(default_factory=list, max_length=MAX_PARTS)
    status: Status = "completed"


class ItemReference(Body):
    """An item of an earlier turn, by its id."""

    type: Literal["item_reference"] = "item_reference"
    id: Annotated[str, StringConstraints(min_length=1)]


_ITEM_TYPES = frozenset({"message", "function_call", "function_call_output", "reasoning", "item_reference"})


def _item_tag(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if kind is None and isinstance(value, dict):
        # Two of them may leave their type out.
        kind = "message" if "role" in value else "item_reference" if "id" in value else None
    return f"{TAG_PREFIX}{kind}" if isinstance(kind, str) and kind in _ITEM_TYPES else None


Item = Annotated[
    Annotated[MessageItem, Tag("~message")]
    | Annotated[FunctionCallItem, Tag("~function_call")]
    | Annotated[FunctionOutputItem, Tag("~function_call_output")]
    | Annotated[ReasoningItem, Tag("~reasoning")]
    | Annotated[ItemReference, Tag("~item_reference")],
    Discriminator(
        _item_tag,
        custom_error_type=UNKNOWN_VARIANT,
        custom_error_message="An input item must be an object with the type 'message', 'function_call', "
        "'function_call_output', 'reasoning' or 'item_reference'",
    ),
]


def _items(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of input items")
    return value


_ItemList = Annotated[list[Item], Field(max_length=MAX_ITEMS)]
Items = Annotated[_ItemList, BeforeValidator(_items, json_schema_input_type=str | _ItemList)]

STORED_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])

_ID_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fc",
    "reasoning": "rs",
}


_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{32})[0-9a-f]{4,8}", re.ASCII)


class Ids:
    """The ids of a response and of its items.

    An item's id begins with its response's, so that a client may name an item alone and the server
    knows which record holds it.
    """

    def __init__(self) -> None:
        self._stem = uuid.uuid4().hex
        self._count = 0

    @property
    def response(self) -> str:
        """The response's own."""
        return f"resp_{self._stem}"

    def new(self, prefix: str) -> str:
        """One of a further item, of the form that OpenAI's have."""
        self._count += 1
        return f"{prefix}_{self._stem}{self._count:04x}"


def response_of(item_id: str) -> str | None:
    """The id of the response that an item belongs to; None for an id that is not of this server's making."""
    found = _ITEM_ID.fullmatch(item_id)
    return f"resp_{found[1]}" if found else None


def listed(items: Sequence[Item], ids: Ids) -> Iterator[dict[str, object]]:
    """Input items as they are shown and stored: whole, each with an id."""
    for item in items:
        shown = item.model_dump()
        if not item.id:
            shown["id"] = ids.new(_ID_PREFIXES[item.type])
        match item:
            case MessageItem(role="assistant"):
                shown["content"] = [_spoken(part) for part in item.content]
            case FunctionOutputItem():
                # A plain string stays one, as clients sent it.
                if len(item.output) == 1 and isinstance(item.output[0], TextPart):
                    shown["output"] = item.output[0].text
            case _:
                pass
        yield shown


def _spoken(part: Part) -> dict[str, object]:
    if isinstance(part, TextPart):
        return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}
    return part.model_dump()
