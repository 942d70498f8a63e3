"""How a client reaches a core: its address, credentials, retries and keep-alive."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Final

import grpc

from osaurus_grpc.cli.runtime import running_servers

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"
# A question about state answers at once; loading reads a model from disk; an answer may be long, and
# fetching a model longer.
QUERY_SECONDS: Final = 10.0
LOAD_SECONDS: Final = 900.0
ANSWER_SECONDS: Final = 600.0
PULL_SECONDS: Final = 86_400.0

_MESSAGE_BYTES: Final = 64 * 1024 * 1024
# gRPC's own retries: a call is sent again as long as nothing of its answer has arrived.
_SERVICE_CONFIG: Final = json.dumps(
    {
        "methodConfig": [
            {
                "name": [
                    {"service": f"osaurus.v1.{name}"}
                    for name in ("InferenceService", "ModelService", "RecordService")
                ],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)
CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config", _SERVICE_CONFIG),
)


@dataclass(frozen=True, slots=True)
class Target:
    """A core, and how to talk to it.

    Attributes:
        address: "HOST:PORT" or another gRPC target.
        api_key: Bearer key; "" sends none.
        credentials: TLS; None is plain text.
    """

    address: str
    api_key: str
    credentials: grpc.ChannelCredentials | None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()


def find(
    address: str = "",
    api_key: str = "",
    *,
    tls: bool = False,
    root_certificates: bytes | None = None,
) -> Target:
    """Find the core to talk to.

    Args:
        address: "HOST:PORT"; "" takes OSAURUS_CORE, else the server that `osaurus serve` runs on this
            machine (the oldest of several), else port 50051 of this machine.
        api_key: Bearer key; "" takes the first of OSAURUS_API_KEY.
        tls: Encrypt, and check the server's certificate.
        root_certificates: PEM certificates to check it against, in place of the system's; implies tls.
    """
    credentials = None
    if tls or root_certificates is not None:
        credentials = grpc.ssl_channel_credentials(root_certificates)
    address = address or os.environ.get("OSAURUS_CORE", "") or _running() or DEFAULT_ADDRESS
    return Target(address, api_key or _key(), credentials)


def _running() -> str:
    servers = running_servers()
    return servers[0].grpc if servers else ""


def _key() -> str:
    keys = os.environ.get("OSAURUS_API_KEY", "").strip()
    if keys.startswith("["):  # the server's form of several
        keys = keys.strip("[]").split(",")[0].strip()
    return keys
