"""Records that front ends keep in the core: the store, and RecordService before it.

Memory only, and bounded: in number and in bytes, where the least recently used record makes way, and
in age. A caller sees its own records; who has no key shares with all who have none.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp

from osaurus_grpc.errors import RecordNotFoundError
from osaurus_grpc.server import calls
from osaurus_grpc.server.convert import seconds_from_duration
from osaurus_grpc.server.validation import FieldViolation, duration_violations, require_valid
from osaurus_grpc.v1 import record_service_pb2
from osaurus_grpc.v1.record_service_pb2_grpc import RecordServiceServicer

if TYPE_CHECKING:
    from osaurus_grpc.server.interceptors import Context

MAX_COLLECTION_CHARACTERS: Final = 64
MAX_ID_CHARACTERS: Final = 256
MAX_CONTENT_BYTES: Final = 8 * 1024 * 1024
# What a record takes beside its content and its names: the objects that hold it.
_OVERHEAD_BYTES: Final = 512


class RecordKey(NamedTuple):
    """Whose record it is, of what kind, and which."""

    caller: str
    collection: str
    id: str


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as it is kept.

    Attributes:
        content: Anything.
        created: When it was put, in nanoseconds since the epoch.
        expires: When it goes, on the store's clock.
        size: Bytes it counts as.
    """

    content: bytes
    created: int
    expires: float
    size: int


class RecordStore:
    """Records in memory. One event loop uses this; there is no lock.

    Args:
        max_records: Records at most; 0 keeps none.
        max_bytes: Of all records together, with what holding them takes.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, *, max_records: int, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._clock = clock
        # Least recently used first.
        self._records: OrderedDict[RecordKey, StoredRecord] = OrderedDict()
        self._bytes = 0
        self._next_expiry = float("inf")

    def __len__(self) -> int:
        return len(self._records)

    @property
    def used_bytes(self) -> int:
        """Bytes that all records count as."""
        return self._bytes

    def put(self, key: RecordKey, content: bytes, *, seconds: float) -> None:
        """Keep a record, in place of one with the same key.

        Args:
            key: Its names.
            content: Anything.
            seconds: Drop it after so long.
        """
        self._drop_expired()
        self._drop(key)
        names = sum(len(part.encode()) for part in key)
        record = StoredRecord(
            content=content,
            created=time.time_ns(),
            expires=self._clock() + seconds,
            size=len(content) + names + _OVERHEAD_BYTES,
        )
        self._records[key] = record
        self._bytes += record.size
        self._next_expiry = min(self._next_expiry, record.expires)
        while self._records and (len(self._records) > self._max_records or self._bytes > self._max_bytes):
            self._drop(next(iter(self._records)))

    def get(self, key: RecordKey) -> StoredRecord | None:
        """A record, which counts as used by this."""
        self._drop_expired()
        record = self._records.get(key)
        if record is not None:
            self._records.move_to_end(key)
        return record

    def delete(self, key: RecordKey) -> bool:
        """Drop a record; False where it is not there."""
        self._drop_expired()
        return self._drop(key)

    def _drop(self, key: RecordKey) -> bool:
        record = self._records.pop(key, None)
        if record is None:
            return False
        self._bytes -= record.size
        return True

    def _drop_expired(self) -> None:
        now = self._clock()
        if now < self._next_expiry:
            return
        for key in [key for key, record in self._records.items() if record.expires <= now]:
            self._drop(key)
        self._next_expiry = min((record.expires for record in self._records.values()), default=float("inf"))


class RecordService(RecordServiceServicer):
    """Keeps records for callers.

    Args:
        store: Where they are kept.
        default_seconds: How long, unless the caller says.
    """

    def __init__(self, store: RecordStore, *, default_seconds: float) -> None:
        self._store = store
        self._default_seconds = default_seconds

    async def PutRecord(  # noqa: N802 - the contract's name, as below
        self, request: record_service_pb2.PutRecordRequest, context: Context
    ) -> record_service_pb2.PutRecordResponse:
        """Keeps a record."""
        require_valid([*_put_violations(request)])
        record = request.record
        seconds = self._default_seconds
        if request.HasField("time_to_live"):
            seconds = seconds_from_duration(request.time_to_live)
        self._store.put(_key(request.collection, record.id), record.content, seconds=seconds)
        return record_service_pb2.PutRecordResponse()

    async def GetRecord(  # noqa: N802
        self, request: record_service_pb2.GetRecordRequest, context: Context
    ) -> record_service_pb2.GetRecordResponse:
        """Reads a record."""
        require_valid([*_name_violations(request.collection, "id", request.id)])
        found = self._store.get(_key(request.collection, request.id))
        if found is None:
            raise RecordNotFoundError(request.id)
        created = Timestamp()
        created.FromNanoseconds(found.created)
        return record_service_pb2.GetRecordResponse(
            record=record_service_pb2.Record(id=request.id, content=found.content, create_time=created)
        )

    async def DeleteRecord(  # noqa: N802
        self, request: record_service_pb2.DeleteRecordRequest, context: Context
    ) -> record_service_pb2.DeleteRecordResponse:
        """Drops a record."""
        require_valid([*_name_violations(request.collection, "id", request.id)])
        if not self._store.delete(_key(request.collection, request.id)):
            raise RecordNotFoundError(request.id)
        return record_service_pb2.DeleteRecordResponse()


def _key(collection: str, record_id: str) -> RecordKey:
    return RecordKey(calls.current().caller, collection, record_id)


def _name_violations(collection: str, id_field: str, record_id: str) -> Iterator[FieldViolation]:
    if not 1 <= len(collection) <= MAX_COLLECTION_CHARACTERS:
        what = f"collection must have 1 to {MAX_COLLECTION_CHARACTERS} characters."
        yield FieldViolation("collection", what)
    if not 1 <= len(record_id) <= MAX_ID_CHARACTERS:
        yield FieldViolation(id_field, f"{id_field} must have 1 to {MAX_ID_CHARACTERS} characters.")


def _put_violations(request: record_service_pb2.PutRecordRequest) -> Iterator[FieldViolation]:
    yield from _name_violations(request.collection, "record.id", request.record.id)
    if len(request.record.content) > MAX_CONTENT_BYTES:
        what = f"record.content must have at most {MAX_CONTENT_BYTES} bytes."
        yield FieldViolation("record.content", what)
    if request.HasField("time_to_live"):
        malformed = [*duration_violations("time_to_live", request.time_to_live)]
        yield from malformed
        if not malformed and seconds_from_duration(request.time_to_live) <= 0:
            yield FieldViolation("time_to_live", "time_to_live must be above 0.")
