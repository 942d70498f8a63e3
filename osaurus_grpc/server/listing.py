"""The installed models as the contract shows them: found by name, described, listed by the page."""

from __future__ import annotations

import asyncio
import base64
import binascii
from bisect import bisect_right

from osaurus_grpc.errors import InvalidRequestError
from osaurus_grpc.models.catalog import Catalog, ModelEntry
from osaurus_grpc.models.residency import Residency
from osaurus_grpc.server.convert import model_to_proto
from osaurus_grpc.server.validation import name_violations, require_valid
from osaurus_grpc.v1 import inference_service_pb2, model_pb2

# Tells our tokens from chance, and one form of them from the next.
_TOKEN_FORM = b"\x01"


class Listing:
    """Catalog and residency, seen together. Catalog scans run in a thread.

    Args:
        catalog: What is on disk.
        residency: What is in memory.
    """

    def __init__(self, catalog: Catalog, residency: Residency) -> None:
        self._catalog = catalog
        self._residency = residency

    async def find(self, name: str) -> ModelEntry:
        """The model that a client's name means.

        Raises:
            InvalidRequestError: The name is too long to be one.
            ModelNotFoundError: No model has that name.
        """
        require_valid([*name_violations("model", name)])
        return await asyncio.to_thread(self._catalog.find, name)

    async def find_listed(self, name: str) -> ModelEntry:
        """As find(), but an alias is found under its own name."""
        require_valid([*name_violations("model", name)])
        return await asyncio.to_thread(self._catalog.find_listed, name)

    async def add_alias(self, source: str, destination: str) -> ModelEntry:
        """Give a model a second name; see Catalog.add_alias()."""
        require_valid([*name_violations("source", source), *name_violations("destination", destination)])
        return await asyncio.to_thread(self._catalog.add_alias, source, destination)

    async def remove_alias(self, name: str) -> bool:
        """Drop a second name; False where the name is none."""
        require_valid([*name_violations("model", name)])
        return await asyncio.to_thread(self._catalog.remove_alias, name)

    async def describe(self, entry: ModelEntry, *, with_template: bool = False) -> model_pb2.Model:
        """One model, with its chat template where asked for."""
        default, template = await asyncio.to_thread(
            lambda: (self._catalog.default(), self._catalog.chat_template(entry) if with_template else "")
        )
        return self._model(entry, default, template)

    async def page(self, size: int, token: str) -> inference_service_pb2.ListModelsResponse:
        """A page of all models and their aliases.

        Args:
            size: Models at most; 0 is all.
            token: next_page_token of the page before, or "".

        Raises:
            InvalidRequestError: The size is negative or the token is none of ours.
        """
        if size < 0:
            raise InvalidRequestError("page_size must be at least 0.", field="page_size")
        after = _id_from_token(token) if token else ""
        entries, default = await asyncio.to_thread(lambda: (self._catalog.listed(), self._catalog.default()))
        # The place is an id and not a number, so that models that come and go shift no page.
        start = bisect_right(entries, after, key=lambda entry: entry.id)
        end = start + size if size else len(entries)
        return inference_service_pb2.ListModelsResponse(
            models=[self._model(entry, default) for entry in entries[start:end]],
            next_page_token=_token_from_id(entries[end - 1].id) if end < len(entries) else "",
        )

    def _model(self, entry: ModelEntry, default: ModelEntry | None, template: str = "") -> model_pb2.Model:
        return model_to_proto(
            entry,
            self._residency.residence(entry.alias_of or entry.id),
            is_default=default is not None and default.id == entry.id,
            chat_template=template,
        )


def _token_from_id(model_id: str) -> str:
    return base64.urlsafe_b64encode(_TOKEN_FORM + model_id.encode()).decode()


def _id_from_token(token: str) -> str:
    try:
        data = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
        if not data.startswith(_TOKEN_FORM):
            raise ValueError
        return data.removeprefix(_TOKEN_FORM).decode()
    except (ValueError, binascii.Error) as error:
        raise InvalidRequestError(
            "page_token is not one that ListModels gave.", field="page_token"
        ) from error
