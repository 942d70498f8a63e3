"""ModelService: decode, do, encode."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from osaurus_grpc.errors import FeatureNotImplementedError, InvalidRequestError
from osaurus_grpc.models.residency import Residency
from osaurus_grpc.server import calls
from osaurus_grpc.server.convert import duration_from_seconds, seconds_from_duration
from osaurus_grpc.server.listing import Listing
from osaurus_grpc.server.validation import duration_violations, require_valid
from osaurus_grpc.v1 import model_service_pb2
from osaurus_grpc.v1.model_service_pb2_grpc import ModelServiceServicer

if TYPE_CHECKING:
    from osaurus_grpc.server.interceptors import Context


class ModelService(ModelServiceServicer):
    """Changes which models are in memory, and their names.

    Args:
        listing: Finds and describes models.
        residency: Loads and unloads them.
    """

    def __init__(self, *, listing: Listing, residency: Residency) -> None:
        self._listing = listing
        self._residency = residency

    async def LoadModel(  # noqa: N802 - the contract's name, as below
        self, request: model_service_pb2.LoadModelRequest, context: Context
    ) -> model_service_pb2.LoadModelResponse:
        """Loads a model."""
        keep_alive = None
        if request.HasField("keep_alive"):
            require_valid([*duration_violations("keep_alive", request.keep_alive)])
            keep_alive = seconds_from_duration(request.keep_alive)
        entry = await self._listing.find(request.model)
        calls.current().model = entry.id
        loaded = await self._residency.load(entry, keep_alive)
        return model_service_pb2.LoadModelResponse(
            model=await self._listing.describe(entry),
            load_duration=duration_from_seconds(loaded.load_seconds),
        )

    async def UnloadModel(  # noqa: N802
        self, request: model_service_pb2.UnloadModelRequest, context: Context
    ) -> model_service_pb2.UnloadModelResponse:
        """Unloads a model."""
        if not request.model:
            raise InvalidRequestError("model must not be empty.", field="model")
        entry = await self._listing.find(request.model)
        calls.current().model = entry.id
        was_loaded = await self._residency.unload(entry.id)
        return model_service_pb2.UnloadModelResponse(was_loaded=was_loaded)

    def PullModel(  # noqa: N802
        self, request: model_service_pb2.PullModelRequest, context: Context
    ) -> AsyncGenerator[model_service_pb2.PullModelResponse, None]:
        """Not in this release."""
        raise FeatureNotImplementedError("PullModel is not implemented in this release; use osaurus pull.")

    def CreateModel(  # noqa: N802
        self, request: model_service_pb2.CreateModelRequest, context: Context
    ) -> AsyncGenerator[model_service_pb2.CreateModelResponse, None]:
        """Not in this release."""
        raise FeatureNotImplementedError("CreateModel is not implemented in this release; use osaurus pull.")

    async def CopyModel(  # noqa: N802
        self, request: model_service_pb2.CopyModelRequest, context: Context
    ) -> model_service_pb2.CopyModelResponse:
        """Gives a model a second name."""
        entry = await self._listing.add_alias(request.source, request.destination)
        calls.current().model = entry.alias_of
        return model_service_pb2.CopyModelResponse(model=await self._listing.describe(entry))

    async def DeleteModel(  # noqa: N802
        self, request: model_service_pb2.DeleteModelRequest, context: Context
    ) -> model_service_pb2.DeleteModelResponse:
        """Drops an alias; deleting a model's files is not in this release."""
        if not request.model:
            raise InvalidRequestError("model must not be empty.", field="model")
        if await self._listing.remove_alias(request.model):
            return model_service_pb2.DeleteModelResponse()
        calls.current().model = (await self._listing.find(request.model)).id
        raise FeatureNotImplementedError(
            "Deleting a model's files is not implemented in this release, only deleting an alias; "
            "use osaurus rm."
        )
