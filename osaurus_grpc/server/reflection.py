"""Server reflection, v1 and v1alpha.

grpcio-reflection ships v1alpha only (grpc/grpc issue 38576). The two versions are the same on the
wire, so v1 is served by the v1alpha servicer under the newer name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

V1ALPHA_NAME: Final[str] = reflection.SERVICE_NAME
V1_NAME: Final = "grpc.reflection.v1.ServerReflection"


def add_reflection(server: grpc.aio.Server, service_names: Sequence[str]) -> None:
    """Serve reflection of some services, and of reflection itself, on a server not yet started."""
    names = (*service_names, V1_NAME, V1ALPHA_NAME)
    servicer = reflection.aio.ReflectionServicer(names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        tuple(
            grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})
            for name in (V1_NAME, V1ALPHA_NAME)
        )
    )
