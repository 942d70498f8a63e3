"""The shim's settings: one frozen dataclass, read once from flags, environment and a TOML file.

A flag wins over the environment, the environment over the file, the file over the default. The file
is ~/.osaurus/config.toml or --config FILE, of which the shim reads the table [rest].
"""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import configargparse

DEFAULT_CONFIG_FILE = "~/.osaurus/config.toml"
ANY_ORIGIN = "*"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the shim process can be told.

    Attributes:
        host: Address the HTTP server binds.
        port: Its port; 0 lets the system choose.
        core: Address of the gRPC core, HOST:PORT or another gRPC target.
        allowed_origins: Origins whose pages may read answers; "*" is any.
        max_body_bytes: Largest request body.
        max_held_body_bytes: Of all large bodies in memory at once; 0 is no limit.
        request_timeout_seconds: Deadline of one request, the reading of its body included.
        keep_alive_interval_seconds: Longest silence of an SSE stream before a comment is sent.
        drain_seconds: How long running requests may go on after SIGTERM.
        allow_image_urls: Fetch the images that requests name by URL.
        image_url_networks: Networks to fetch them from besides public addresses, in CIDR form.
        insecure_expose: Allow another address than loopback although the core asks for no key.
        log_level: Of the standard logging levels.
        send_timeout_seconds: How long an answer waits for a client that does not read, before it is cut.
    """

    host: str = "127.0.0.1"
    port: int = 1337
    core: str = "127.0.0.1:50051"
    allowed_origins: tuple[str, ...] = (ANY_ORIGIN,)
    max_body_bytes: int = 32 * 1024 * 1024
    max_held_body_bytes: int = 128 * 1024 * 1024
    request_timeout_seconds: float = 600.0
    keep_alive_interval_seconds: float = 15.0
    drain_seconds: float = 30.0
    allow_image_urls: bool = False
    image_url_networks: tuple[str, ...] = ()
    insecure_expose: bool = False
    log_level: str = "info"
    send_timeout_seconds: float = 60.0


def _whole(minimum: int, maximum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{value} is not between {minimum} and {maximum}")
        return value

    parse.__name__ = "whole number"
    return parse


def _seconds(minimum: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not minimum <= value <= 1e9:
            raise argparse.ArgumentTypeError(f"{text} is not a number of seconds of at least {minimum}")
        return value

    parse.__name__ = "number of seconds"
    return parse


def _network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no network, such as 10.0.0.0/8") from error


def parser() -> configargparse.ArgumentParser:
    """The shim's command line, environment and file as one parser."""
    built = configargparse.ArgumentParser(
        prog="osaurus-rest",
        description="The HTTP front of Osaurus: OpenAI's and Ollama's APIs, mapped onto its gRPC core.",
        default_config_files=[DEFAULT_CONFIG_FILE],
        config_file_parser_class=configargparse.TomlConfigParser(["rest"]),
        add_env_var_help=False,
        add_config_file_help=False,
        allow_abbrev=False,
    )
    built.add_argument("--config", is_config_file_arg=True, metavar="FILE", help="TOML file with settings")
    add_arguments(built)
    return built


def add_arguments(target: configargparse.ArgumentParser) -> None:
    """Declare the shim's options on a parser that also reads the environment and the file."""
    defaults = Settings()
    add = target.add_argument
    add("--host", env_var="OSAURUS_REST_HOST", default=defaults.host,
        help="address to bind (default %(default)s)")  # fmt: skip
    add("--port", env_var="OSU_PORT", type=_whole(0, 65535), default=defaults.port,
        help="HTTP port (default %(default)s)")  # fmt: skip
    add("--core", env_var="OSAURUS_CORE", default=defaults.core, metavar="ADDRESS",
        help="address of the gRPC core (default %(default)s)")  # fmt: skip
    add("--allowed-origin", env_var="OSAURUS_ALLOWED_ORIGIN", action="append", default=[], metavar="ORIGIN",
        help="web origin whose pages may use the API; may be repeated (default any)")  # fmt: skip
    add("--max-body-bytes", env_var="OSAURUS_MAX_BODY_BYTES", type=_whole(1, 2**31 - 1), metavar="N",
        default=defaults.max_body_bytes, help="largest request body (default %(default)s)")  # fmt: skip
    add("--max-held-body-bytes", env_var="OSAURUS_MAX_HELD_BODY_BYTES", type=_whole(0, 2**40), metavar="N",
        default=defaults.max_held_body_bytes,
        help="of large request bodies in memory at once, 0 for no limit (default %(default)s)")  # fmt: skip
    add("--request-timeout-seconds", env_var="OSAURUS_REQUEST_TIMEOUT_SECONDS", type=_seconds(0.001),
        default=defaults.request_timeout_seconds, metavar="S",
        help="longest that one request may take (default %(default)s)")  # fmt: skip
    add("--keep-alive-interval-seconds", env_var="OSAURUS_KEEP_ALIVE_INTERVAL_SECONDS", type=_seconds(0.001),
        default=defaults.keep_alive_interval_seconds, metavar="S",
        help="longest silence of an event stream (default %(default)s)")  # fmt: skip
    add("--send-timeout-seconds", env_var="OSAURUS_SEND_TIMEOUT_SECONDS", type=_seconds(0.001), metavar="S",
        default=defaults.send_timeout_seconds,
        help="cut an answer whose client takes nothing for so long (default %(default)s)")  # fmt: skip
    add("--drain-seconds", env_var="OSAURUS_DRAIN_SECONDS", type=_seconds(0.0), metavar="S",
        default=defaults.drain_seconds,
        help="how long running requests may go on after SIGTERM (default %(default)s)")  # fmt: skip
    add("--allow-image-urls", env_var="OSAURUS_ALLOW_IMAGE_URLS", action="store_true",
        help="fetch images that requests name by URL, from public addresses (default off)")  # fmt: skip
    add("--image-url-network", env_var="OSAURUS_IMAGE_URL_NETWORK", action="append", default=[],
        type=_network, metavar="CIDR",
        help="private network to fetch such images from, too; may be repeated")  # fmt: skip
    add("--insecure-expose", env_var="OSAURUS_INSECURE_EXPOSE", action="store_true",
        help="allow another address than loopback although the core asks for no key")  # fmt: skip
    add("--log-level", env_var="OSAURUS_LOG_LEVEL", default=defaults.log_level,
        choices=("debug", "info", "warning", "error"), help="(default %(default)s)")  # fmt: skip


def read(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (None: this process's), the environment and the TOML file.

    Raises SystemExit with usage on a wrong flag.
    """
    values = parser().parse_args(arguments)
    return Settings(
        host=values.host,
        port=values.port,
        core=values.core,
        allowed_origins=tuple(values.allowed_origin) or (ANY_ORIGIN,),
        max_body_bytes=values.max_body_bytes,
        max_held_body_bytes=values.max_held_body_bytes,
        request_timeout_seconds=values.request_timeout_seconds,
        keep_alive_interval_seconds=values.keep_alive_interval_seconds,
        drain_seconds=values.drain_seconds,
        allow_image_urls=values.allow_image_urls,
        image_url_networks=tuple(values.image_url_network),
        insecure_expose=values.insecure_expose,
        log_level=values.log_level,
        send_timeout_seconds=values.send_timeout_seconds,
    )


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine only."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
