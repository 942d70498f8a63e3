"""What can keep a core from starting, as far as it can be told without MLX, transformers and gRPC.

They take seconds to import, and nobody should wait for them to hear that a port is taken.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

from osaurus_grpc.models.ownership import ModelsDirInUseError, models_dir_lock
from osaurus_grpc.settings import Settings, is_loopback

METRICS_HOST = "127.0.0.1"


class StartError(Exception):
    """The core cannot start, or cannot go on; the text is for the person who started it."""


def address_of(host: str, port: int) -> str:
    """HOST:PORT."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def require_bindable(host: str, port: int, flag: str) -> None:
    """Bind for a moment, since gRPC's own failure does not tell why.

    Args:
        host: The host.
        port: The port; 0 is any.
        flag: Which chooses another port.

    Raises:
        StartError: The port is taken, or the host is not of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise StartError(f"cannot listen on {address_of(host, port)}: unknown host") from error
    failures = []
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # As gRPC does: connections of a server that just ended do not keep the port.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen(1)
        except OSError as error:
            failures.append(error)
    # "localhost" often has an IPv6 address on machines without IPv6: one good address is enough,
    # unless somebody else answers on another.
    taken = [error for error in failures if error.errno == errno.EADDRINUSE]
    if taken or len(failures) == len(found):
        failure = (taken or failures)[0]
        raise StartError(bind_failure(address_of(host, port), failure, flag)) from failure


def bind_failure(address: str, error: OSError, flag: str) -> str:
    """Why an address cannot be listened on, for the person who started the core."""
    match error.errno:
        case errno.EADDRINUSE:
            return f"cannot listen on {address}: the port is taken; choose another with {flag}"
        case errno.EADDRNOTAVAIL:
            return f"cannot listen on {address}: no such address on this machine"
        case errno.EACCES | errno.EPERM:
            return f"cannot listen on {address}: not permitted"
        case _:
            return f"cannot listen on {address}: {error.strerror or 'the system refuses'}"


def require_startable(settings: Settings) -> None:
    """Raise StartError where a core could not start with these settings, as things are now."""
    with models_dir_of(settings):
        require_listening(settings)
    if settings.metrics_port:
        require_bindable(METRICS_HOST, settings.metrics_port, "--metrics-port")


def require_listening(settings: Settings) -> None:
    """Require that the core's address can be listened on, and may be.

    Raises:
        StartError: The address cannot be bound, or must not be without a key; a key is empty.
    """
    if not all(key.strip() for key in settings.api_keys):
        raise StartError("an API key is empty; anyone could show that one")
    if not (is_loopback(settings.host) or settings.api_keys or settings.insecure_expose):
        raise StartError(
            f"refusing to listen on {settings.host}, which others can reach, without a key: "
            "set OSAURUS_API_KEY, or pass --insecure-expose to do it all the same"
        )
    require_bindable(settings.host, settings.grpc_port, "--grpc-port")


@contextlib.contextmanager
def models_dir_of(settings: Settings) -> Iterator[None]:
    """Hold the models directory.

    Raises:
        StartError: Another server holds it, or it does not exist.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(
                models_dir_lock(settings.models_dir, is_shared=not settings.reject_shared_models_dir)
            )
        except ModelsDirInUseError:
            raise StartError(
                f"another server uses the models directory {settings.models_dir}; stop it, choose another "
                "with --models-dir, or pass --share-models-dir to run beside it"
            ) from None
        except FileNotFoundError:
            raise StartError(f"the models directory {settings.models_dir} does not exist") from None
        yield
