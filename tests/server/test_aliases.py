"""CopyModel and DeleteModel on a real server, and what holds a loaded model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from osaurus_grpc.server.app import Core
from osaurus_grpc.v1 import inference_service_pb2, model_pb2, model_service_pb2
from osaurus_grpc.v1.model_service_pb2_grpc import ModelServiceStub
from tests.server.cores import TINY, chat_request, failure, inference_stub, running_core, text_of

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session")
async def core_of_one(tiny_dir: Path, tmp_path: Path) -> AsyncIterator[Core]:
    (tmp_path / TINY).symlink_to(tiny_dir / TINY)
    async with running_core(tmp_path) as core:
        yield core


@pytest_asyncio.fixture(loop_scope="session")
async def models(core_of_one: Core) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(core_of_one.address) as channel:
        yield ModelServiceStub(channel)


def copy(source: str, destination: str) -> model_service_pb2.CopyModelRequest:
    return model_service_pb2.CopyModelRequest(source=source, destination=destination)


async def test_a_copy_is_a_name_and_no_second_model(core_of_one: Core, models: Any, tmp_path: Path) -> None:
    async with inference_stub(core_of_one.address) as inference:
        plain = await inference.Chat(chat_request())
        copied = await models.CopyModel(copy(TINY, "My-Copy:latest"))
        assert copied.model.id == "my-copy"
        assert copied.model.state == model_pb2.MODEL_STATE_LOADED
        assert not copied.model.is_default

        answer = await inference.Chat(chat_request(model="my-copy"))
        assert text_of(answer) == text_of(plain)
        assert not answer.timings.HasField("load_duration")
        listed = (await inference.ListModels(inference_service_pb2.ListModelsRequest())).models
        assert [model.id for model in listed] == ["my-copy", TINY]
        assert listed[0].digest == listed[1].digest
        shown = await inference.GetModel(inference_service_pb2.GetModelRequest(model="my-copy"))
        assert shown.model.id == "my-copy"
        assert shown.model.chat_template

        request = model_service_pb2.DeleteModelRequest(model="my-copy:latest")
        await models.DeleteModel(request)
        error = await failure(models.DeleteModel(request))
        assert (error.code, error.info.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert (await failure(inference.Chat(chat_request(model="my-copy")))).info.reason == "MODEL_NOT_FOUND"
        assert (await inference.Chat(chat_request())).choices
    assert (tmp_path / TINY / "config.json").exists()


async def test_an_alias_outlives_the_server(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / TINY).symlink_to(tiny_dir / TINY)
    async with running_core(tmp_path) as core, grpc.aio.insecure_channel(core.address) as channel:
        await ModelServiceStub(channel).CopyModel(copy("", "second"))
    async with running_core(tmp_path) as core, inference_stub(core.address) as inference:
        assert (await inference.Chat(chat_request(model="second"))).model == TINY


async def test_what_cannot_be_copied(models: Any) -> None:
    error = await failure(models.CopyModel(copy("nothing", "x")))
    assert (error.code, error.info.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    error = await failure(models.CopyModel(copy(TINY, TINY)))
    assert (error.code, error.info.reason) == (grpc.StatusCode.ALREADY_EXISTS, "MODEL_EXISTS")
    for destination in ("", "../x", "x" * 600):
        error = await failure(models.CopyModel(copy(TINY, destination)))
        assert error.fields == ["destination"]


async def test_a_models_files_are_not_deleted_yet(models: Any) -> None:
    error = await failure(models.DeleteModel(model_service_pb2.DeleteModelRequest(model=TINY)))
    assert (error.code, error.info.reason) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED")
    assert "files" in error.message
    error = await failure(models.DeleteModel(model_service_pb2.DeleteModelRequest()))
    assert error.fields == ["model"]


async def test_what_holds_a_model_is_told_once_it_is_loaded(core_of_one: Core, models: Any) -> None:
    async with inference_stub(core_of_one.address) as inference:
        request = inference_service_pb2.GetModelRequest(model=TINY)
        assert (await inference.GetModel(request)).model.device == ""
        loaded = await models.LoadModel(model_service_pb2.LoadModelRequest(model=TINY))
        assert loaded.model.device in ("cpu", "gpu")
        assert (await inference.GetModel(request)).model.device == loaded.model.device
