"""How much of a prompt its system messages and tools make up: what other conversations will share."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import takewhile

from osaurus_grpc.chat.types import Message, Role, ToolSpec
from osaurus_grpc.errors import OsaurusError

_MAX_ENTRIES = 256
_SYSTEM_ROLES = (Role.SYSTEM, Role.DEVELOPER)
# Templates refuse conversations without a question; what it is does not matter.
_QUESTION = Message(role=Role.USER, content="?")


class StablePrefixes:
    """Lengths of such beginnings, each rendered once. May be used on several threads.

    Args:
        max_entries: Lengths remembered; the least recently used go first.
    """

    def __init__(self, max_entries: int = _MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._lengths: OrderedDict[bytes, int] = OrderedDict()
        self._lock = threading.Lock()

    def length(
        self,
        model: Hashable,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
        options: object,
        prompt: Sequence[int],
        render: Callable[[Sequence[Message]], Sequence[int]],
    ) -> int:
        """Tokens at a prompt's beginning that do not depend on what was said after the system messages.

        Args:
            model: Tells models apart.
            messages: The conversation.
            tools: Those the model is told of.
            options: What else changes how the template writes; its repr() must tell such options apart.
            prompt: The conversation's tokens.
            render: Tokens of another conversation with the same tools and options.
        """
        system = list(takewhile(lambda message: message.role in _SYSTEM_ROLES, messages))
        if not system and not tools:
            return 0
        key = hashlib.blake2b(repr((model, system, tools, options)).encode(errors="surrogatepass")).digest()
        with self._lock:
            if key in self._lengths:
                self._lengths.move_to_end(key)
                return min(self._lengths[key], len(prompt))
        try:
            other = render([*system, _QUESTION])
        except OsaurusError:  # a template with further demands: nothing is known of its beginning
            other = ()
        length = 0
        while length < min(len(other), len(prompt)) and other[length] == prompt[length]:
            length += 1
        with self._lock:
            self._lengths[key] = length
            if len(self._lengths) > self._max_entries:
                self._lengths.popitem(last=False)
        return length
