"""The Responses API over a real connection, with records kept by a scripted core."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import pytest

from osaurus_grpc.v1 import chat_pb2, record_service_pb2

from ..scripted_core import MODEL, ScriptedCore, abort, answer, started

PATH = "/v1/responses"


async def create(http: aiohttp.ClientSession, given: object, **fields: object) -> dict[str, object]:
    async with http.post(PATH, json={"model": MODEL, "input": given, **fields}) as response:
        assert response.status == 200, await response.text()
        body: dict[str, object] = await response.json()
        return body


async def error_of(response: aiohttp.ClientResponse) -> tuple[int, str, str | None]:
    error = (await response.json())["error"]
    return response.status, error["code"], error["param"]


def last_event(data: str) -> Any:
    *_, last, done, nothing = data.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return json.loads(last.split("data: ")[1])


def texts_of(core: ScriptedCore) -> list[str]:
    asked = [one for one in core.requests if isinstance(one, chat_pb2.ChatRequest)]
    return ["".join(part.text for part in message.content) for message in asked[-1].messages]


async def test_a_response_is_stored_and_read_back(http: aiohttp.ClientSession, core: ScriptedCore) -> None:
    made = await create(http, "Hello", metadata={"a": "b"})
    assert (made["status"], made["store"], made["model"]) == ("completed", True, MODEL)
    async with http.get(f"{PATH}/{made['id']}") as response:
        assert await response.json() == made
    async with http.delete(f"{PATH}/{made['id']}") as response:
        assert await response.json() == {"id": made["id"], "object": "response", "deleted": True}
    assert not core.records
    for method in ("GET", "DELETE"):
        async with http.request(method, f"{PATH}/{made['id']}") as response:
            assert await error_of(response) == (404, "not_found", None)


async def test_store_false_keeps_nothing(http: aiohttp.ClientSession, core: ScriptedCore) -> None:
    made = await create(http, "Hello", store=False)
    assert made["store"] is False
    assert not core.records


async def test_a_conversation_is_continued_by_its_id(http: aiohttp.ClientSession, core: ScriptedCore) -> None:
    said = "I'm doing well, thank you! How can I help you today?"
    first = await create(http, "one", instructions="Be brief.")
    second = await create(http, "two", previous_response_id=first["id"])
    assert texts_of(core) == ["one", said, "two"]
    third = await create(
        http, [{"role": "user", "content": "three"}], previous_response_id=second["id"], instructions="Long."
    )
    assert texts_of(core) == ["Long.", "one", said, "two", said, "three"]
    assert third["previous_response_id"] == second["id"]
    # Another branch from the first.
    await create(http, "other", previous_response_id=first["id"])
    assert texts_of(core) == ["one", said, "other"]
    # Nothing new: the conversation as it stands.
    item = first["output"][0]  # type: ignore[index]  # JSON
    await create(http, [{"type": "item_reference", "id": item["id"]}], previous_response_id=first["id"])
    assert texts_of(core) == ["one", said, said]


async def test_a_conversation_whose_record_is_gone(http: aiohttp.ClientSession, core: ScriptedCore) -> None:
    first = await create(http, "one")
    second = await create(http, "two", previous_response_id=first["id"])
    async with http.delete(f"{PATH}/{first['id']}") as response:
        assert response.status == 200
    for missing in (second["id"], "resp_unknown"):
        asked = {"model": MODEL, "input": "three", "previous_response_id": missing}
        async with http.post(PATH, json=asked) as response:
            assert await error_of(response) == (400, "previous_response_not_found", "previous_response_id")


async def test_a_conversation_that_runs_in_a_circle_ends(
    http: aiohttp.ClientSession, core: ScriptedCore
) -> None:
    record = {"response": {"output": [], "previous_response_id": "resp_1"}, "input": []}
    core.records["responses", "resp_1"] = record_service_pb2.Record(content=json.dumps(record).encode())
    asked = {"model": MODEL, "input": "x", "previous_response_id": "resp_1"}
    async with http.post(PATH, json=asked) as response:
        assert await error_of(response) == (400, "invalid_request", "previous_response_id")


class TestInputItems:
    @pytest.fixture
    async def path(self, http: aiohttp.ClientSession) -> str:
        items = [{"role": "user", "content": str(index)} for index in range(5)]
        return f"{PATH}/{(await create(http, items))['id']}/input_items"

    async def page(self, http: aiohttp.ClientSession, path: str, **query: str) -> dict[str, object]:
        async with http.get(path, params=query) as response:
            assert response.status == 200
            body: dict[str, object] = await response.json()
            return body

    async def test_order(self, http: aiohttp.ClientSession, path: str) -> None:
        for order, texts in (("asc", "01234"), ("desc", "43210")):
            body = await self.page(http, path, order=order)
            assert "".join(item["content"][0]["text"] for item in body["data"]) == texts  # type: ignore[attr-defined]  # JSON
            assert (body["object"], body["has_more"]) == ("list", False)
        assert (await self.page(http, path))["data"] == body["data"]
        assert await self.page(http, path + "/") == body

    async def test_pages(self, http: aiohttp.ClientSession, path: str) -> None:
        first = await self.page(http, path, order="asc", limit="3")
        assert first["has_more"] is True
        rest = await self.page(http, path, order="asc", after=str(first["last_id"]))
        assert rest["has_more"] is False
        ids = [item["id"] for page in (first, rest) for item in page["data"]]  # type: ignore[attr-defined]  # JSON
        assert len(set(ids)) == 5
        nothing = await self.page(http, path, order="asc", after=str(rest["last_id"]))
        assert (nothing["data"], nothing["first_id"], nothing["last_id"]) == ([], None, None)

    async def test_of_a_response_that_continues_others(self, http: aiohttp.ClientSession) -> None:
        first = await create(http, "one")
        second = await create(http, "two", previous_response_id=first["id"])
        third = await create(http, "three", previous_response_id=second["id"])
        path = f"{PATH}/{third['id']}/input_items"
        outputs = [made["output"][0]["id"] for made in (first, second)]  # type: ignore[index]  # JSON

        async def said(**query: str) -> list[Any]:
            items: Any = (await self.page(http, path, order="asc", **query))["data"]
            return [item["id"] if item["id"] in outputs else item["content"][0]["text"] for item in items]

        assert await said() == ["one", outputs[0], "two", outputs[1], "three"]
        assert await said(after=outputs[0]) == ["two", outputs[1], "three"]
        # What is gone is not shown, and what is there still is.
        async with http.delete(f"{PATH}/{first['id']}") as response:
            assert response.status == 200
        assert await said() == ["two", outputs[1], "three"]

    async def test_an_item_that_came_twice_is_listed_once(self, http: aiohttp.ClientSession) -> None:
        """Paging by a cursor would not end otherwise."""
        first = await create(http, "one")
        named = {"type": "item_reference", "id": first["output"][0]["id"]}  # type: ignore[index]  # JSON
        made = await create(http, [named, named], previous_response_id=first["id"])
        ids, after = [], {}
        for _ in range(4):
            page = await self.page(http, f"{PATH}/{made['id']}/input_items", limit="1", **after)
            ids += [item["id"] for item in page["data"]]  # type: ignore[attr-defined]  # JSON
            after = {"after": str(page["last_id"])}
            if not page["has_more"]:
                break
        assert (len(ids), ids.count(named["id"])) == (2, 1)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("limit", "0"),
            ("limit", "101"),
            ("limit", "x"),
            ("limit", "²"),
            ("order", "up"),
            ("after", "msg_9"),
        ],
    )
    async def test_wrong_parameters(
        self, http: aiohttp.ClientSession, path: str, name: str, value: str
    ) -> None:
        async with http.get(path, params={name: value}) as response:
            assert await error_of(response) == (400, "invalid_request", name)

    async def test_an_unknown_response(self, http: aiohttp.ClientSession) -> None:
        async with http.get(f"{PATH}/resp_unknown/input_items") as response:
            assert (await error_of(response))[:2] == (404, "not_found")


class TestStream:
    async def test_a_response_is_stored_before_its_end_is_seen(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        async with http.post(PATH, json={"model": MODEL, "input": "Hello", "stream": True}) as response:
            assert response.headers["Content-Type"] == "text/event-stream"
            data = (await response.read()).decode()
        last = last_event(data)
        assert last["type"] == "response.completed"
        async with http.get(f"{PATH}/{last['response']['id']}") as stored:
            assert await stored.json() == last["response"]
        await create(http, "more", previous_response_id=last["response"]["id"])
        assert texts_of(core) == ["Hello", "I'm doing", "more"]

    async def test_a_failure_before_the_first_event(
        self, http: aiohttp.ClientSession, core: ScriptedCore
    ) -> None:
        async def script(
            _request: chat_pb2.ChatStreamRequest, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            await abort(
                context, grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", "It is too long."
            )
            yield started()

        core.stream_script = script
        async with http.post(PATH, json={"model": MODEL, "input": "Hello", "stream": True}) as response:
            assert await error_of(response) == (400, "context_length_exceeded", "input")

    async def test_a_failure_after_it(self, http: aiohttp.ClientSession, core: ScriptedCore) -> None:
        async def script(
            _request: chat_pb2.ChatStreamRequest, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ChatStreamResponse]:
            for event in list(answer("a"))[:2]:
                yield event
            await abort(context, grpc.StatusCode.INTERNAL, "ENGINE_FAILED", "The engine failed.")

        core.stream_script = script
        async with http.post(PATH, json={"model": MODEL, "input": "Hello", "stream": True}) as response:
            data = (await response.read()).decode()
        last = last_event(data)
        assert last["type"] == "response.failed"
        assert last["response"]["error"] == {"code": "server_error", "message": "The engine failed."}
        assert not core.records


async def test_an_answer_survives_a_record_that_cannot_be_kept(
    http: aiohttp.ClientSession, core: ScriptedCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(
        _core: ScriptedCore, _request: record_service_pb2.PutRecordRequest, context: grpc.aio.ServicerContext
    ) -> record_service_pb2.PutRecordResponse:
        await abort(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "It is too large.")
        raise AssertionError

    monkeypatch.setattr(ScriptedCore, "_keep", refuse)
    made = await create(http, "Hello")
    assert made["output"]
    assert made["store"] is False
    async with http.post(PATH, json={"model": MODEL, "input": "Hello", "stream": True}) as response:
        data = (await response.read()).decode()
    assert last_event(data)["response"]["store"] is False


async def test_methods(http: aiohttp.ClientSession) -> None:
    async with http.get(PATH) as response:
        assert (response.status, response.headers["Allow"]) == (405, "OPTIONS, POST")
    async with http.post(f"{PATH}/resp_1") as response:
        assert (response.status, response.headers["Allow"]) == (405, "DELETE, GET, HEAD, OPTIONS")
    async with http.options(f"{PATH}/resp_1") as response:
        assert "DELETE" in response.headers["Access-Control-Allow-Methods"]
    async with http.get(f"{PATH}/resp_1", params={"stream": "true"}) as response:
        assert await error_of(response) == (400, "invalid_request", "stream")
    async with http.get(f"{PATH}/resp_1", params={"starting_after": "3"}) as response:
        assert await error_of(response) == (400, "invalid_request", "starting_after")
    async with http.post(f"{PATH}/compact", json={"model": MODEL}) as response:
        assert await error_of(response) == (501, "not_implemented", None)


async def test_an_item_of_any_kept_response_may_be_referred_to(
    http: aiohttp.ClientSession, core: ScriptedCore
) -> None:
    """As clients do that keep the items' ids and no conversation."""
    said = "I'm doing well, thank you! How can I help you today?"
    first, second = await create(http, "one"), await create(http, "two")
    async with http.get(f"{PATH}/{first['id']}/input_items") as response:
        own = (await response.json())["data"][0]["id"]
    outputs = [made["output"][0]["id"] for made in (first, second)]  # type: ignore[index]  # JSON
    named = [{"type": "item_reference", "id": item_id} for item_id in (own, *outputs)]
    made = await create(http, [*named, {"role": "user", "content": "three"}])
    assert texts_of(core) == ["one", said, said, "three"]
    async with http.get(f"{PATH}/{made['id']}/input_items", params={"order": "asc"}) as response:
        shown = (await response.json())["data"]
    assert [item["id"] for item in shown[:3]] == [own, *outputs]
    unknown = {"type": "item_reference", "id": f"msg_{'0' * 32}0001"}
    async with http.post(PATH, json={"model": MODEL, "input": [named[0], unknown]}) as response:
        assert await error_of(response) == (400, "invalid_request", "input[1].id")


async def test_cancelling(http: aiohttp.ClientSession) -> None:
    made = await create(http, "Hello")
    async with http.post(f"{PATH}/{made['id']}/cancel") as response:
        assert await error_of(response) == (400, "invalid_request", "id")
    async with http.post(f"{PATH}/resp_unknown/cancel") as response:
        assert (await error_of(response))[:2] == (404, "not_found")
