"""The Python client of the core: Osaurus for threads, AsyncOsaurus for asyncio.

Without arguments it finds the server that `osaurus serve` runs on this machine.

    >>> from osaurus_grpc.client import Osaurus
    >>> client = Osaurus()
    >>> reply = client.chat("What is the capital of France?", max_tokens=16, temperature=0)
    >>> print(reply.text)  # doctest: +ELLIPSIS
    The capital of France is Paris...

An answer can be read as it is generated; leaving the block stops the generation:

    >>> with client.stream("Count to ten.", max_tokens=8) as stream:
    ...     text = "".join(stream.text)

The events of a stream are a union to match on:

    >>> from osaurus_grpc.client import Completed, TextDelta
    >>> with client.stream("Hello!", max_tokens=4) as stream:
    ...     for event in stream:
    ...         match event:
    ...             case TextDelta(text=text):
    ...                 pass
    ...             case Completed(usage=usage):
    ...                 print(usage.completion_tokens <= 4)
    True

Failures are exceptions that name what is wrong:

    >>> from osaurus_grpc.errors import InvalidRequestError
    >>> try:
    ...     client.chat("Hello!", temperature=9)
    ... except InvalidRequestError as error:
    ...     print(error.field)
    sampling.temperature
    >>> client.close()
"""

from __future__ import annotations

from osaurus_grpc.client.aio import AsyncOsaurus, AsyncStream
from osaurus_grpc.client.blocking import Osaurus, Stream
from osaurus_grpc.client.events import (
    Answer,
    ChoiceFinished,
    Completed,
    Event,
    FinishReason,
    PromptProgress,
    ReasoningDelta,
    Reply,
    Started,
    TextDelta,
    ToolCall,
    ToolCallDelta,
)
from osaurus_grpc.client.failures import TransportError
from osaurus_grpc.client.request import ChatOptions

__all__ = [
    "Answer",
    "AsyncOsaurus",
    "AsyncStream",
    "ChatOptions",
    "ChoiceFinished",
    "Completed",
    "Event",
    "FinishReason",
    "Osaurus",
    "PromptProgress",
    "ReasoningDelta",
    "Reply",
    "Started",
    "Stream",
    "TextDelta",
    "ToolCall",
    "ToolCallDelta",
    "TransportError",
]
