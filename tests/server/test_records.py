"""The store with a clock of the test's, and RecordService on a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from osaurus_grpc.server.app import MAX_MESSAGE_BYTES, Core
from osaurus_grpc.server.records import MAX_CONTENT_BYTES, RecordKey, RecordStore
from osaurus_grpc.v1 import record_service_pb2 as pb
from osaurus_grpc.v1.record_service_pb2_grpc import RecordServiceStub
from tests.server.cores import RichError, failure, running_core

on_a_server = pytest.mark.asyncio(loop_scope="session")


class Clock:
    """Seconds that pass when the test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def key(name: str, *, caller: str = "") -> RecordKey:
    return RecordKey(caller, "responses", name)


def test_the_least_recently_used_record_makes_way() -> None:
    store = RecordStore(max_records=2, max_bytes=2**20)
    store.put(key("a"), b"1", seconds=9)
    store.put(key("b"), b"2", seconds=9)
    assert store.get(key("a")) is not None

    store.put(key("c"), b"3", seconds=9)

    assert store.get(key("b")) is None
    assert store.get(key("a")) is not None
    assert store.get(key("c")) is not None


def test_bytes_are_bounded() -> None:
    store = RecordStore(max_records=100, max_bytes=10_000)
    for i in range(20):
        store.put(key(str(i)), bytes(3_000), seconds=9)

        assert store.used_bytes <= 10_000
    assert len(store) == 2
    store.put(key("large"), bytes(10_001), seconds=9)
    assert (len(store), store.used_bytes) == (0, 0)


def test_records_age() -> None:
    clock = Clock()
    store = RecordStore(max_records=9, max_bytes=2**20, clock=clock)
    store.put(key("short"), b"", seconds=1)
    store.put(key("long"), b"", seconds=5)

    clock.now = 0.9
    assert store.get(key("short")) is not None
    clock.now = 1.0
    assert store.get(key("short")) is None
    assert store.get(key("long")) is not None
    clock.now = 6.0
    assert not store.delete(key("long"))
    assert (len(store), store.used_bytes) == (0, 0)


def test_none_are_kept_where_that_is_turned_off() -> None:
    store = RecordStore(max_records=0, max_bytes=2**20)
    store.put(key("a"), b"1", seconds=9)

    assert store.get(key("a")) is None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "get", "delete", "wait"]),
            st.integers(0, 5),
            st.integers(0, 3_000),
        ),
        max_size=60,
    )
)
def test_a_store_is_a_bounded_mapping(steps: list[tuple[str, int, int]]) -> None:
    """Whatever happens: what is found is what was put last, the bounds hold, and bytes add up."""
    clock = Clock()
    store = RecordStore(max_records=3, max_bytes=6_000, clock=clock)
    model: dict[RecordKey, tuple[bytes, float]] = {}
    for verb, number, size in steps:
        name = key(str(number))
        match verb:
            case "put":
                content = bytes([number]) * size
                store.put(name, content, seconds=size + 1)
                model[name] = (content, clock.now + size + 1)
            case "get":
                found = store.get(name)
                if found is not None:
                    content, expires = model[name]
                    assert found.content == content
                    assert clock.now < expires
            case "delete":
                store.delete(name)
                model.pop(name, None)
                assert store.get(name) is None
            case _:
                clock.now += size
        assert len(store) <= 3
        assert 0 <= store.used_bytes <= 6_000
        assert bool(len(store)) == bool(store.used_bytes)


@asynccontextmanager
async def records_of(core: Core) -> AsyncIterator[Any]:
    # By default a client takes 4 MiB at most.
    options = (("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),)
    async with grpc.aio.insecure_channel(core.address, options) as channel:
        yield RecordServiceStub(channel)


def put(record_id: str, content: bytes = b"x", **fields: Any) -> pb.PutRecordRequest:
    record = pb.Record(id=record_id, content=content)
    return pb.PutRecordRequest(**{"collection": "responses", "record": record, **fields})


def get(record_id: str, collection: str = "responses") -> pb.GetRecordRequest:
    return pb.GetRecordRequest(collection=collection, id=record_id)


def delete(record_id: str, collection: str = "responses") -> pb.DeleteRecordRequest:
    return pb.DeleteRecordRequest(collection=collection, id=record_id)


def require_not_found(error: RichError, name: str) -> None:
    assert (error.code, error.info.reason) == (grpc.StatusCode.NOT_FOUND, "RECORD_NOT_FOUND")
    assert error.info.metadata["record"] == name
    assert error.resource is not None
    assert (error.resource.resource_type, error.resource.resource_name) == ("osaurus.ai/Record", name)


@on_a_server
async def test_a_record_is_put_read_replaced_and_dropped(core: Core) -> None:
    async with records_of(core) as records:
        before = datetime.now(UTC) - timedelta(seconds=1)
        await records.PutRecord(put("r1", bytes(range(256))))
        record = (await records.GetRecord(get("r1"))).record
        assert (record.id, record.content) == ("r1", bytes(range(256)))
        assert before <= record.create_time.ToDatetime(UTC) <= datetime.now(UTC)

        await records.PutRecord(put("r1", b"second"))
        assert (await records.GetRecord(get("r1"))).record.content == b"second"
        require_not_found(await failure(records.GetRecord(get("r1", "others"))), "r1")

        await records.DeleteRecord(delete("r1"))
        require_not_found(await failure(records.GetRecord(get("r1"))), "r1")
        require_not_found(await failure(records.DeleteRecord(delete("r1"))), "r1")


@on_a_server
async def test_the_largest_record_fits_and_a_larger_one_does_not(core: Core) -> None:
    async with records_of(core) as records:
        await records.PutRecord(put("large", bytes(MAX_CONTENT_BYTES)))
        assert len((await records.GetRecord(get("large"))).record.content) == MAX_CONTENT_BYTES
        error = await failure(records.PutRecord(put("large", bytes(MAX_CONTENT_BYTES + 1))))
        assert error.fields == ["record.content"]
        await records.DeleteRecord(delete("large"))


@on_a_server
async def test_bad_fields_are_named(core: Core) -> None:
    async with records_of(core) as records:
        calls = {
            "record.id": records.PutRecord(put("")),
            "collection": records.PutRecord(put("a", collection="")),
            "time_to_live": records.PutRecord(put("a", time_to_live=Duration(seconds=0))),
            "id": records.GetRecord(get("x" * 257)),
        }
        for field, call in calls.items():
            error = await failure(call)
            assert (error.code, error.info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
            assert error.fields == [field]
        error = await failure(records.PutRecord(put("a", time_to_live=Duration(seconds=1, nanos=-1))))
        assert error.fields == ["time_to_live"]
        error = await failure(records.DeleteRecord(delete("", "c" * 65)))
        assert error.fields == ["collection", "id"]


@on_a_server
async def test_callers_see_their_own_records(tiny_dir: Path) -> None:
    def bearer(name: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {name}"),)

    async with running_core(tiny_dir, api_keys=("one", "two")) as core, records_of(core) as records:
        await records.PutRecord(put("r", b"of one"), metadata=bearer("one"))
        require_not_found(await failure(records.GetRecord(get("r"), metadata=bearer("two"))), "r")
        require_not_found(await failure(records.DeleteRecord(delete("r"), metadata=bearer("two"))), "r")
        await records.PutRecord(put("r", b"of two"), metadata=bearer("two"))
        for name in ("one", "two"):
            found = await records.GetRecord(get("r"), metadata=bearer(name))
            assert found.record.content == f"of {name}".encode()
        error = await failure(records.GetRecord(get("r")))
        assert error.code == grpc.StatusCode.UNAUTHENTICATED


@on_a_server
async def test_the_settings_reach_the_store(tiny_dir: Path) -> None:
    async with running_core(tiny_dir, max_records=1) as core, records_of(core) as records:
        await records.PutRecord(put("a"))
        await records.PutRecord(put("b"))
        require_not_found(await failure(records.GetRecord(get("a"))), "a")
        assert (await records.GetRecord(get("b"))).record.content == b"x"
