"""The clients over TLS. The core itself speaks plain text; TLS is what stands before it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
import trustme

from osaurus_grpc.client import AsyncOsaurus, TransportError
from osaurus_grpc.v1 import inference_service_pb2, inference_service_pb2_grpc, model_pb2


class _Models(inference_service_pb2_grpc.InferenceServiceServicer):
    """Lists one model to callers who bring the key."""

    async def ListModels(self, request, context):  # noqa: N802 - the contract's name
        metadata = dict(context.invocation_metadata())
        assert metadata["authorization"] == "Bearer the-key"
        return inference_service_pb2.ListModelsResponse(models=[model_pb2.Model(id="m")])


@asynccontextmanager
async def tls_server(authority: trustme.CA) -> AsyncIterator[str]:
    certificate = authority.issue_cert("localhost")
    credentials = grpc.ssl_server_credentials(
        [(certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())]
    )
    server = grpc.aio.server()
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(_Models(), server)
    port = server.add_secure_port("localhost:0", credentials)
    await server.start()
    try:
        yield f"localhost:{port}"
    finally:
        await server.stop(None)


async def test_a_server_of_a_known_authority_is_believed():
    authority = trustme.CA()
    async with tls_server(authority) as address:
        root = authority.cert_pem.bytes()
        async with AsyncOsaurus(address, "the-key", root_certificates=root) as client:
            assert [model.id for model in await client.list_models(timeout=30)] == ["m"]


@pytest.mark.parametrize("options", [{"tls": True}, {"root_certificates": trustme.CA().cert_pem.bytes()}])
async def test_another_server_is_not_believed(options):
    async with tls_server(trustme.CA()) as address, AsyncOsaurus(address, "the-key", **options) as client:
        with pytest.raises(TransportError):
            await client.list_models(timeout=10)
