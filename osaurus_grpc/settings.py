"""The core's settings: one frozen dataclass, read once from flags, environment and a TOML file.

A flag wins over the environment, the environment over the file, the file over the default. Every
option has the environment variable OSAURUS_ and its name; the models directory and the ports also
answer to the names the original Osaurus uses (OSU_MODELS_DIR, OSU_PORT). The file is
~/.osaurus/config.toml or --config FILE; the core reads its table [core].
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import configargparse

DEFAULT_CONFIG_FILE = "~/.osaurus/config.toml"
_MAX_SECONDS: Final = 1e9


@dataclass(frozen=True, slots=True)
class Settings:
    """What the core process can be told.

    Attributes:
        host: Address the gRPC server binds.
        grpc_port: Its port; 0 lets the system choose.
        models_dir: Where models live.
        hub_cache_dir: The Hugging Face cache, read only; None leaves it out.
        default_model: What an empty model name and "default" mean; "" is the only model, if there
            is one.
        fallback_model: What an unknown model name means; "" refuses it.
        aliases: Names to model ids.
        preload_model: Loaded before the server reports that it serves; "" loads on first use.
        max_concurrent_requests: A model, running and waiting; 0 is no limit.
        requests_per_minute: A model; 0 is no limit.
        max_batch_size: Sequences decoded together.
        max_waiting_requests: Sequences waiting for a place in the batch, over all models.
        max_output_tokens: Cap of every request's max_tokens; 0 is none.
        prefill_chunk_tokens: Prompt tokens processed between two decode steps of running streams.
        max_pause_steps: Decode steps that the time between two tokens of a running stream may grow to while
            a prompt is processed.
        prompt_cache_bytes: Of KV caches that each model keeps for requests that begin alike; 0 keeps
            none, negative takes a tenth of the memory.
        prompt_cache_bits: Of keys and values while they are kept so: 8, 4, or 0 for as they are. Recurrent
            states stay as they are. Price and gain, measured on SmolLM2 135M with 512 tokens reused: 8
            takes 0.56 of float16's bytes, moves log-probabilities of likely tokens by up to 0.23 (mean
            KL divergence 0.0004); 4 takes 0.31, moves them by up to 0.8 (0.027). Greedy text changed
            after 26 and 5 tokens. Finished caches are then not continued in place but always copied.
        kv_cache_bytes: Of the KV caches of all models, of running requests and kept ones; negative
            takes three quarters of the memory that is free when the weights are in.
        prompt_cache_dir: Where KV caches are written, to be found again after a restart; None writes none.
        prompt_cache_dir_bytes: Of these files; negative takes 30 GiB or a quarter of what is free there
            at the start, whichever is less.
        prompt_lookup_tokens: Tokens that a request which runs alone guesses from its own text at most,
            to verify them in one pass; 0 guesses none. Pays where answers repeat their prompts.
        draft_model: Guesses for all models of its vocabulary where a request runs alone. "" is none.
        draft_tokens: Tokens that it guesses at once at most.
        max_loaded_models: Models in memory at once; the least recently used idle one makes way.
        keep_alive_seconds: Unload a model that was not used for so long; negative is never.
        dtype: "auto", or what weights are held in: "float32", "float16", "bfloat16", "native".
        blas_threads: Threads of the CPU's BLAS; 0 chooses.
        max_sessions: Conversations that the core remembers under their session ids; 0 remembers none.
        session_idle_seconds: A session unused for so long is forgotten.
        max_records: Records that front ends may keep in the core; 0 keeps none.
        max_record_bytes: Bytes of all those records together.
        record_ttl_seconds: How long a record is kept whose caller does not say.
        api_keys: Bearer keys that callers must show; none turns authentication off.
        insecure_expose: Allow another address than loopback without a key.
        drain_seconds: How long running requests may go on after SIGTERM.
        send_timeout_seconds: How long a stream waits for a client that does not read, before it is ended.
        reject_shared_models_dir: Refuse to start where another server uses the models directory.
        metrics_port: Loopback port of the core's Prometheus metrics; 0 turns them off.
        log_level: Of the standard logging levels.
    """

    host: str = "127.0.0.1"
    grpc_port: int = 50051
    models_dir: Path = field(default_factory=lambda: Path("~/MLXModels").expanduser())
    hub_cache_dir: Path | None = None
    default_model: str = ""
    fallback_model: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    preload_model: str = ""
    max_concurrent_requests: int = 10
    requests_per_minute: int = 100
    max_batch_size: int = 32
    max_waiting_requests: int = 512
    max_output_tokens: int = 0
    prefill_chunk_tokens: int = 512
    max_pause_steps: int = 4
    prompt_cache_bytes: int = -1
    prompt_cache_bits: int = 0
    kv_cache_bytes: int = -1
    prompt_cache_dir: Path | None = None
    prompt_cache_dir_bytes: int = -1
    prompt_lookup_tokens: int = 0
    draft_model: str = ""
    draft_tokens: int = 4
    max_loaded_models: int = 3
    keep_alive_seconds: float = -1.0
    dtype: str = "auto"
    blas_threads: int = 0
    max_sessions: int = 32
    session_idle_seconds: int = 300
    max_records: int = 10_000
    max_record_bytes: int = 256 * 2**20
    record_ttl_seconds: int = 86_400
    api_keys: tuple[str, ...] = ()
    insecure_expose: bool = False
    drain_seconds: float = 30.0
    send_timeout_seconds: float = 60.0
    reject_shared_models_dir: bool = True
    metrics_port: int = 0
    log_level: str = "info"


def default_hub_cache_dir() -> Path:
    """The Hugging Face cache of this user, by the hub's own environment variables."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def whole(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number within bounds."""

    def parse(text: str) -> int:
        value = int(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{value} is not between {minimum} and {maximum}")
        return value

    parse.__name__ = "whole number"
    return parse


def seconds(minimum: float) -> Callable[[str], float]:
    """An argparse type: a number of seconds, finite and of a least value."""

    def parse(text: str) -> float:
        value = float(text)
        if not minimum <= value <= _MAX_SECONDS:
            raise argparse.ArgumentTypeError(f"{text} is not a number of seconds of at least {minimum:g}")
        return value

    parse.__name__ = "number of seconds"
    return parse


def alias(text: str) -> tuple[str, str]:
    """An argparse type: NAME=MODEL."""
    name, separator, model = text.partition("=")
    if not (separator and name.strip() and model.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=MODEL")
    return name.strip(), model.strip()


def expanded_path(text: str) -> Path:
    """An argparse type: a path with ~ expanded, made absolute."""
    return Path(text).expanduser().absolute()


def parser(prog: str, description: str, table: str) -> configargparse.ArgumentParser:
    """An argument parser that also reads the environment and one table of the TOML file."""
    built = configargparse.ArgumentParser(
        prog=prog,
        description=description,
        default_config_files=[DEFAULT_CONFIG_FILE],
        config_file_parser_class=configargparse.TomlConfigParser([table]),
        add_env_var_help=False,
        add_config_file_help=False,
        allow_abbrev=False,
    )
    built.add_argument("--config", is_config_file_arg=True, metavar="FILE", help="TOML file with settings")
    return built


def add_arguments(target: configargparse.ArgumentParser) -> None:
    """Declare the core's options on a parser made by parser()."""
    defaults = Settings()
    add = target.add_argument
    add("--host", env_var="OSAURUS_HOST", default=defaults.host, help="address to bind (default %(default)s)")
    add("--grpc-port", env_var="OSAURUS_GRPC_PORT", type=whole(0, 65535), default=defaults.grpc_port,
        metavar="PORT", help="gRPC port (default %(default)s)")  # fmt: skip
    add("--models-dir", env_var="OSU_MODELS_DIR", type=expanded_path, default=defaults.models_dir,
        metavar="DIR", help="where models live (default ~/MLXModels)")  # fmt: skip
    add("--no-hub-cache", env_var="OSAURUS_NO_HUB_CACHE", action="store_true",
        help="do not list models of the Hugging Face cache")  # fmt: skip
    add("--default-model", env_var="OSAURUS_DEFAULT_MODEL", default="", metavar="NAME",
        help="what an empty model name means")  # fmt: skip
    add("--fallback-model", env_var="OSAURUS_FALLBACK_MODEL", default="", metavar="NAME",
        help="what an unknown model name means (default: an error)")  # fmt: skip
    add("--alias", env_var="OSAURUS_ALIAS", type=alias, action="append", default=[], metavar="NAME=MODEL",
        help="another name for a model; may be repeated")  # fmt: skip
    add("--preload-model", env_var="OSAURUS_PRELOAD_MODEL", default="", metavar="NAME",
        help="load this model before serving")  # fmt: skip
    _add_limits(target, defaults)


def _add_limits(target: configargparse.ArgumentParser, defaults: Settings) -> None:
    """Declare how much the core takes on, and how it runs."""
    add = target.add_argument
    add("--max-concurrent-requests", env_var="OSAURUS_MAX_CONCURRENT_REQUESTS", type=whole(0), metavar="N",
        default=defaults.max_concurrent_requests,
        help="requests a model takes at once, 0 for no limit (default %(default)s)")  # fmt: skip
    add("--requests-per-minute", env_var="OSAURUS_REQUESTS_PER_MINUTE", type=whole(0), metavar="N",
        default=defaults.requests_per_minute,
        help="requests a model takes a minute, 0 for no limit (default %(default)s)")  # fmt: skip
    add("--max-batch-size", env_var="OSAURUS_MAX_BATCH_SIZE", type=whole(1, 1024), metavar="N",
        default=defaults.max_batch_size, help="sequences decoded together (default %(default)s)")  # fmt: skip
    add("--max-waiting-requests", env_var="OSAURUS_MAX_WAITING_REQUESTS", type=whole(0), metavar="N",
        default=defaults.max_waiting_requests,
        help="sequences that may wait for a place (default %(default)s)")  # fmt: skip
    add("--max-output-tokens", env_var="OSAURUS_MAX_OUTPUT_TOKENS", type=whole(0), metavar="N",
        default=defaults.max_output_tokens, help="cap of every answer's length, 0 for none")  # fmt: skip
    add("--prefill-chunk-tokens", env_var="OSAURUS_PREFILL_CHUNK_TOKENS", type=whole(1, 65536), metavar="N",
        default=defaults.prefill_chunk_tokens,
        help="prompt tokens processed between two decode steps at most (default %(default)s)")  # fmt: skip
    add("--max-pause-steps", env_var="OSAURUS_MAX_PAUSE_STEPS", type=whole(1, 1024), metavar="N",
        default=defaults.max_pause_steps,
        help="decode steps that the time between two tokens of a running stream may grow to while a "
        "prompt is processed (default %(default)s)")  # fmt: skip
    _add_caches(target, defaults)
    add("--max-loaded-models", env_var="OSAURUS_MAX_LOADED_MODELS", type=whole(1, 1024), metavar="N",
        default=defaults.max_loaded_models, help="models in memory (default %(default)s)")  # fmt: skip
    add("--keep-alive-seconds", env_var="OSAURUS_KEEP_ALIVE_SECONDS", type=seconds(-_MAX_SECONDS),
        default=defaults.keep_alive_seconds, metavar="S",
        help="unload a model unused for so long, negative for never (default never)")  # fmt: skip
    add("--dtype", env_var="OSAURUS_DTYPE", default=defaults.dtype,
        choices=("auto", "native", "float32", "float16", "bfloat16"),
        help="what weights are held in (default %(default)s)")  # fmt: skip
    add("--blas-threads", env_var="OSAURUS_BLAS_THREADS", type=whole(0, 1024), metavar="N",
        default=defaults.blas_threads, help="threads of the CPU's BLAS, 0 chooses")  # fmt: skip
    _add_memory(target, defaults)
    _add_speculation(target, defaults)
    add("--api-key", env_var="OSAURUS_API_KEY", action="append", default=[], metavar="KEY",
        help="bearer key that callers must show; may be repeated; better given as OSAURUS_API_KEY, "
        "which other users of the machine cannot see")  # fmt: skip
    add("--insecure-expose", env_var="OSAURUS_INSECURE_EXPOSE", action="store_true",
        help="allow another address than loopback without a key")  # fmt: skip
    add("--drain-seconds", env_var="OSAURUS_DRAIN_SECONDS", type=seconds(0.0), metavar="S",
        default=defaults.drain_seconds,
        help="how long running requests may go on after SIGTERM (default %(default)s)")  # fmt: skip
    add("--send-timeout-seconds", env_var="OSAURUS_SEND_TIMEOUT_SECONDS", type=seconds(0.001), metavar="S",
        default=defaults.send_timeout_seconds,
        help="end a stream whose client takes nothing for so long (default %(default)s)")  # fmt: skip
    add("--share-models-dir", env_var="OSAURUS_SHARE_MODELS_DIR", action="store_true",
        help="start although another server uses the models directory")  # fmt: skip
    add("--metrics-port", env_var="OSAURUS_METRICS_PORT", type=whole(0, 65535), metavar="PORT",
        default=defaults.metrics_port,
        help="loopback port of the core's Prometheus metrics (default off)")  # fmt: skip
    add("--log-level", env_var="OSAURUS_LOG_LEVEL", default=defaults.log_level,
        choices=("debug", "info", "warning", "error"), help="(default %(default)s)")  # fmt: skip


def _add_caches(target: configargparse.ArgumentParser, defaults: Settings) -> None:
    """Declare what KV caches may take, and where they are kept."""
    add = target.add_argument
    add("--prompt-cache-bytes", env_var="OSAURUS_PROMPT_CACHE_BYTES", type=whole(-1, 2**62), metavar="N",
        default=defaults.prompt_cache_bytes,
        help="of KV caches that a model keeps for requests that begin alike, 0 for none "
        "(default a tenth of the memory)")  # fmt: skip
    add("--prompt-cache-bits", env_var="OSAURUS_PROMPT_CACHE_BITS", type=int, choices=(0, 4, 8),
        default=defaults.prompt_cache_bits,
        help="quantize KV caches while they are kept: 8 takes about half the memory of 16-bit values, "
        "4 a third; reuse may then change an answer, with 4 noticeably (default 0: as they are)")  # fmt: skip
    add("--kv-cache-bytes", env_var="OSAURUS_KV_CACHE_BYTES", type=whole(-1, 2**62), metavar="N",
        default=defaults.kv_cache_bytes,
        help="of the KV caches of all models together; requests wait while theirs would not fit "
        "(default three quarters of the memory that the weights leave)")  # fmt: skip
    add("--prompt-cache-dir", env_var="OSAURUS_PROMPT_CACHE_DIR", type=expanded_path, default=None,
        metavar="DIR", help="write KV caches there, for requests that begin alike after a restart; "
        "they hold conversations (default: they are not written)")  # fmt: skip
    add("--prompt-cache-dir-bytes", env_var="OSAURUS_PROMPT_CACHE_DIR_BYTES", type=whole(-1, 2**62),
        default=defaults.prompt_cache_dir_bytes, metavar="N",
        help="of the files there (default 30 GiB, or a quarter of the free space if less)")  # fmt: skip


def _add_speculation(target: configargparse.ArgumentParser, defaults: Settings) -> None:
    """Declare how a request that runs alone guesses ahead."""
    add = target.add_argument
    add("--prompt-lookup-tokens", env_var="OSAURUS_PROMPT_LOOKUP_TOKENS", type=whole(0, 64), metavar="N",
        default=defaults.prompt_lookup_tokens,
        help="tokens that a request which runs alone guesses from its own text, to verify them in one "
        "pass; the answer stays the same (default 0: off)")  # fmt: skip
    add("--draft-model", env_var="OSAURUS_DRAFT_MODEL", default="", metavar="NAME",
        help="a small model that guesses for a request which runs alone, of models of its vocabulary "
        "(default none)")  # fmt: skip
    add("--draft-tokens", env_var="OSAURUS_DRAFT_TOKENS", type=whole(1, 64), metavar="N",
        default=defaults.draft_tokens,
        help="tokens that it guesses at once at most (default %(default)s)")  # fmt: skip


def _add_memory(target: configargparse.ArgumentParser, defaults: Settings) -> None:
    """Declare what the core remembers for callers."""
    add = target.add_argument
    add("--max-sessions", env_var="OSAURUS_MAX_SESSIONS", type=whole(0), default=defaults.max_sessions,
        metavar="N", help="conversations kept by session_id, 0 for none (default %(default)s)")  # fmt: skip
    add("--session-idle-seconds", env_var="OSAURUS_SESSION_IDLE_SECONDS", type=whole(1), metavar="S",
        default=defaults.session_idle_seconds,
        help="forget a conversation unused for so long (default %(default)s)")  # fmt: skip
    add("--max-records", env_var="OSAURUS_MAX_RECORDS", type=whole(0), default=defaults.max_records,
        metavar="N", help="stored answers kept in memory, 0 for none (default %(default)s)")  # fmt: skip
    add("--max-record-bytes", env_var="OSAURUS_MAX_RECORD_BYTES", type=whole(0, 2**62), metavar="N",
        default=defaults.max_record_bytes,
        help="of all stored answers together (default %(default)s)")  # fmt: skip
    add("--record-ttl-seconds", env_var="OSAURUS_RECORD_TTL_SECONDS", type=whole(1), metavar="S",
        default=defaults.record_ttl_seconds,
        help="how long a stored answer is kept (default %(default)s)")  # fmt: skip


def from_namespace(values: argparse.Namespace) -> Settings:
    """Settings from what a parser with add_arguments() parsed."""
    return Settings(
        host=values.host,
        grpc_port=values.grpc_port,
        models_dir=values.models_dir,
        hub_cache_dir=None if values.no_hub_cache else default_hub_cache_dir(),
        default_model=values.default_model,
        fallback_model=values.fallback_model,
        aliases=tuple(values.alias),
        preload_model=values.preload_model,
        max_concurrent_requests=values.max_concurrent_requests,
        requests_per_minute=values.requests_per_minute,
        max_batch_size=values.max_batch_size,
        max_waiting_requests=values.max_waiting_requests,
        max_output_tokens=values.max_output_tokens,
        prefill_chunk_tokens=values.prefill_chunk_tokens,
        max_pause_steps=values.max_pause_steps,
        prompt_cache_bytes=values.prompt_cache_bytes,
        prompt_cache_bits=values.prompt_cache_bits,
        kv_cache_bytes=values.kv_cache_bytes,
        prompt_cache_dir=values.prompt_cache_dir,
        prompt_cache_dir_bytes=values.prompt_cache_dir_bytes,
        prompt_lookup_tokens=values.prompt_lookup_tokens,
        draft_model=values.draft_model,
        draft_tokens=values.draft_tokens,
        max_loaded_models=values.max_loaded_models,
        keep_alive_seconds=values.keep_alive_seconds,
        dtype=values.dtype,
        blas_threads=values.blas_threads,
        max_sessions=values.max_sessions,
        session_idle_seconds=values.session_idle_seconds,
        max_records=values.max_records,
        max_record_bytes=values.max_record_bytes,
        record_ttl_seconds=values.record_ttl_seconds,
        api_keys=tuple(values.api_key),
        insecure_expose=values.insecure_expose,
        drain_seconds=values.drain_seconds,
        send_timeout_seconds=values.send_timeout_seconds,
        reject_shared_models_dir=not values.share_models_dir,
        metrics_port=values.metrics_port,
        log_level=values.log_level,
    )


def read(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (None: this process's), the environment and the TOML file.

    Raises SystemExit with usage on a wrong flag.
    """
    built = parser("osaurus-core", "The gRPC core of Osaurus.", "core")
    add_arguments(built)
    return from_namespace(built.parse_args(arguments))


def is_loopback(host: str) -> bool:
    """Whether an address to bind is reachable from this machine only."""
    return host in {"localhost", "::1"} or host.startswith("127.")


def default_runtime_dir() -> Path:
    """Where running servers leave word of themselves, for status, stop and clients."""
    return Path(os.environ.get("OSAURUS_RUNTIME_DIR", "~/.osaurus/runtime")).expanduser()
