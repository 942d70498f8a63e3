"""Conversations that the core keeps under a name, for each caller and model its own.

Messages and token ids, no tensors: a session remembers what was said, and the engine's prompt cache,
which knows no sessions, finds the KV cache by the tokens. Sessions live in this room because they
belong to callers; how a turn's tokens carry over into the next is the chat room's business
(chat/transcript.py).

Two styles of clients meet here. One sends the whole conversation with every request; the other sends
its new turn only. Messages without an assistant's and without a system's, on a session that has a
history, continue that history; any others are a conversation of their own, and the session begins
anew with them. A request's messages thus always stand in its prompt, all of them.

A turn is kept when its answer is complete. A request that fails or is cancelled leaves the session as
it was, so that it may be sent again. While one request holds a session, others read the history that
it began with and leave no trace.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from osaurus_grpc.chat.transcript import Transcript
from osaurus_grpc.chat.types import Message, Role

_RESTARTING_ROLES: Final = frozenset({Role.SYSTEM, Role.DEVELOPER, Role.ASSISTANT})


class SessionKey(NamedTuple):
    """Whose session it is, with which model, and its name."""

    caller: str
    model_id: str
    id: str


@dataclass(frozen=True, slots=True)
class History:
    """What a session remembers.

    Attributes:
        messages: The conversation, its last answer included.
        transcript: The tokens of it, as the model of that fingerprint read and wrote them.
        fingerprint: Of the model that answered; another one has other tokens.
    """

    messages: tuple[Message, ...] = ()
    transcript: Transcript | None = None
    fingerprint: str = ""

    def continued_by(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The conversation that a request with these messages is about."""
        if any(message.role in _RESTARTING_ROLES for message in messages):
            return tuple(messages)
        return (*self.messages, *messages)


@dataclass(slots=True)
class _Session:
    last_used: float
    history: History = field(default_factory=History)
    is_held: bool = False


class Turn:
    """One request's part in a session.

    Attributes:
        history: What the session remembered when the request came; nothing without a session.
        is_kept: The answer will be remembered, if it is given to keep().
    """

    def __init__(self, session: _Session | None = None, *, holds: bool = False) -> None:
        self._session = session
        self.history = session.history if session is not None else History()
        self.is_kept = holds

    def keep(self, history: History) -> None:
        """Remember a complete answer, and leave the session to the next request."""
        if self._session is not None and self.is_kept:
            self._session.history = history
            self.release()

    def release(self) -> None:
        """Leave the session to the next request; as it is, where nothing was kept."""
        if self._session is not None and self.is_kept:
            self._session.is_held = False
            self.is_kept = False


class Sessions:
    """The sessions of a core. One event loop uses this; there is no lock.

    Args:
        max_sessions: Kept at most, the least recently used makes way; 0 keeps none. Sessions in use
            may exceed it, and are as many as the requests are.
        idle_seconds: A session unused for so long is forgotten.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, *, max_sessions: int, idle_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_sessions = max_sessions
        self._idle_seconds = idle_seconds
        self._clock = clock
        # Least recently used first.
        self._sessions: OrderedDict[SessionKey, _Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def peek(self, key: SessionKey) -> History:
        """What a session remembers, without using it."""
        self._forget_idle()
        session = self._sessions.get(key)
        return session.history if session is not None else History()

    @contextmanager
    def turn(self, key: SessionKey) -> Iterator[Turn]:
        """Take part in a session: hold it, or where another request does, only read it.

        Args:
            key: The session; one without an id is none.
        """
        if not key.id or not self._max_sessions:
            yield Turn()
            return
        self._forget_idle()
        session = self._sessions.setdefault(key, _Session(self._clock()))
        turn = Turn(session, holds=not session.is_held)
        session.is_held = True
        try:
            yield turn
        finally:
            turn.release()
            session.last_used = self._clock()
            if key in self._sessions:
                self._sessions.move_to_end(key)
            self._make_room()

    def _forget_idle(self) -> None:
        oldest = self._clock() - self._idle_seconds
        idle = [key for key, s in self._sessions.items() if not s.is_held and s.last_used <= oldest]
        for key in idle:
            del self._sessions[key]

    def _make_room(self) -> None:
        """Forget sessions that nobody holds, those without a history first."""
        excess = len(self._sessions) - self._max_sessions
        free = [key for key, session in self._sessions.items() if not session.is_held]
        # A request that failed leaves an empty session, which must not push out another.
        empty = [key for key in free if not self._sessions[key].history.messages]
        for key in empty:
            del self._sessions[key]
        for key in [key for key in free if key not in empty][: max(excess - len(empty), 0)]:
            del self._sessions[key]
