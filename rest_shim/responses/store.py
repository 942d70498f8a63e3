"""Stored responses, kept as records of the core, so that the shim keeps nothing."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from rest_shim.backend import Backend, Caller
from rest_shim.errors import CoreError, Refusal
from rest_shim.responses.items import STORED_ITEMS, Item, response_of
from rest_shim.wire import dump

log = logging.getLogger(__name__)

COLLECTION = "responses"
# Turns that one conversation is followed back.
MAX_TURNS = 1_024
MAX_HISTORY_BYTES = 64 * 1024 * 1024

_NO_RECORD = "RECORD_NOT_FOUND"


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One turn.

    Attributes:
        resource: The response as its client saw it.
        input: The items of its own request, references resolved, each with an id.
    """

    resource: Mapping[str, object]
    input: Sequence[Mapping[str, object]]


class ResponseStore:
    """The responses of all callers; the core keeps those of different keys apart."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def put(self, response_id: str, stored: StoredResponse, caller: Caller) -> bool:
        """Keep a response; says whether the core took it. An answer is not lost with its record."""
        content = dump({"response": stored.resource, "input": stored.input}).encode("ascii")
        try:
            await self._backend.put_record(COLLECTION, response_id, content, caller)
        except CoreError as error:
            log.warning("response not stored code=%s reason=%s", error.code, error.reason or "-")
            return False
        return True

    async def get(self, response_id: str, caller: Caller) -> StoredResponse:
        """A response.

        Raises:
            Refusal: There is none of that id.
            CoreError: The core cannot be asked.
        """
        return (await self._read(response_id, caller))[0]

    async def delete(self, response_id: str, caller: Caller) -> None:
        """Drop a response; those that continue it cannot be continued any more.

        Raises:
            Refusal: There is none of that id.
            CoreError: The core cannot be asked.
        """
        try:
            await self._backend.delete_record(COLLECTION, response_id, caller)
        except CoreError as error:
            raise _missing(error, response_id) from error

    async def history(self, response_id: str | None, caller: Caller) -> Sequence[Item]:
        """The items of a response and of all that it continues, oldest first.

        Raises:
            Refusal: One of them is gone, or they are too many.
            CoreError: The core cannot be asked.
        """
        turns: list[Sequence[object]] = []
        try:
            async for turn in self._turns_back(response_id, caller):
                turns.append(turn)
        except Refusal as refusal:
            if refusal.status != HTTPStatus.NOT_FOUND:
                raise
            raise _no_history(response_id or "") from None
        return STORED_ITEMS.validate_python([item for turn in reversed(turns) for item in turn])

    async def input_items(self, response_id: str, caller: Caller) -> Sequence[Mapping[str, object]]:
        """The items that a response was made of, oldest first and each once.

        They are those of the turns that it continues, as far as these are kept, and its own.

        Raises:
            Refusal: There is no response of that id.
            CoreError: The core cannot be asked.
        """
        stored = await self.get(response_id, caller)
        turns = [stored.input]
        with contextlib.suppress(Refusal):
            async for turn in self._turns_back(_previous(stored), caller):
                turns.append(turn)
        return list({item["id"]: item for turn in reversed(turns) for item in turn}.values())

    async def _turns_back(
        self, response_id: str | None, caller: Caller
    ) -> AsyncIterator[Sequence[Mapping[str, object]]]:
        """The items of a response and of those that it continues, turn by turn, newest first.

        Raises:
            Refusal: One of them is gone, or they are too many.
            CoreError: The core cannot be asked.
        """
        count = size = 0
        while response_id is not None:
            stored, read = await self._read(response_id, caller)
            count += 1
            size += read
            if count > MAX_TURNS or size > MAX_HISTORY_BYTES:
                text = "The conversation is too long to be continued by its id; send its items instead."
                raise Refusal(400, text, param="previous_response_id")
            yield _items_of(stored)
            response_id = _previous(stored)

    async def items(self, item_ids: Sequence[str], caller: Caller) -> Mapping[str, Item]:
        """Items of any responses, by id; those that are not found are left out.

        Raises:
            CoreError: The core cannot be asked.
        """
        wanted = {response_id for item_id in item_ids if (response_id := response_of(item_id)) is not None}
        found: list[object] = []
        size = 0
        for response_id in sorted(wanted)[:MAX_TURNS]:
            try:
                stored, read = await self._read(response_id, caller)
            except Refusal:
                continue
            size += read
            if size > MAX_HISTORY_BYTES:
                break
            found.extend(_items_of(stored))
        asked = set(item_ids)
        return {item.id: item for item in STORED_ITEMS.validate_python(found) if item.id in asked}

    async def _read(self, response_id: str, caller: Caller) -> tuple[StoredResponse, int]:
        try:
            content = await self._backend.get_record(COLLECTION, response_id, caller)
        except CoreError as error:
            raise _missing(error, response_id) from error
        record = json.loads(content)
        return StoredResponse(resource=record["response"], input=record["input"]), len(content)


def _previous(stored: StoredResponse) -> str | None:
    previous = stored.resource.get("previous_response_id")
    return previous if isinstance(previous, str) else None


def _items_of(stored: StoredResponse) -> list[Mapping[str, object]]:
    output = stored.resource.get("output")
    return [*stored.input, *(output if isinstance(output, list) else ())]


def _missing(error: CoreError, response_id: str) -> Exception:
    if error.reason != _NO_RECORD:
        return error
    return Refusal(404, f"Response with id '{response_id}' not found.", code="not_found")


def _no_history(response_id: str) -> Refusal:
    return Refusal(
        400,
        f"Previous response with id '{response_id}' not found.",
        code="previous_response_not_found",
        param="previous_response_id",
    )
