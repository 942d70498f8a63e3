"""osaurus run: asks a model one question, or chats with it in the terminal.

A server that runs on the same models directory answers, if there is one; else a core of our own
does, on a port and with a key that nobody else knows, and ends with the command.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from typing import TYPE_CHECKING

from osaurus_grpc.cli import runtime
from osaurus_grpc.cli.install import ensure_installed
from osaurus_grpc.cli.options import (
    add_api_key_option,
    add_models_options,
    api_key,
    command_parser,
    core_settings,
)
from osaurus_grpc.cli.output import CommandError, note
from osaurus_grpc.cli.process import Child, ChildEndedError
from osaurus_grpc.errors import OsaurusError
from osaurus_grpc.settings import Settings

if TYPE_CHECKING:
    from osaurus_grpc.client import AsyncOsaurus
    from osaurus_grpc.v1.chat_pb2 import ChatRequest

_STOP_SECONDS = 10.0
_CHAT_HINT = "/bye or Ctrl-D ends the chat, /clear forgets it, Ctrl-C stops an answer."


def main(arguments: Sequence[str]) -> int:
    """Answer one prompt, or chat until the person ends it."""
    values = _parser().parse_intermixed_args(arguments)
    prompt = _prompt(values)
    core = core_settings(values)
    with asyncio.Runner() as runner:
        conversation = Conversation(values, core)
        try:
            runner.run(conversation.open())
            if prompt is None:
                _chat(runner, conversation)
            else:
                runner.run(conversation.ask(prompt))
        finally:
            runner.run(conversation.close())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "run",
        "Ask a model one question, or chat with it in the terminal. A missing model is fetched first.",
        epilog="Without a prompt, it is read from standard input; in a terminal that is a chat.",
    )
    parser.add_argument("model", metavar="MODEL", help="the model")
    parser.add_argument("prompt", metavar="PROMPT", nargs="*", default=[], help="the question")
    parser.add_argument("--system", metavar="TEXT", default="", help="instructions to the model")
    parser.add_argument("--temperature", metavar="T", type=float, help="0 is greedy (default 0.7)")
    parser.add_argument("--max-tokens", metavar="N", type=int, help="length of an answer (default 2048)")
    parser.add_argument("--seed", metavar="N", type=int, help="the same seed gives the same answer")
    add_models_options(parser)
    add_api_key_option(parser)
    return parser


def _prompt(values: argparse.Namespace) -> str | None:
    """The one question, or None for a chat."""
    if values.prompt:
        return " ".join(values.prompt)
    if sys.stdin.isatty():
        return None
    text = sys.stdin.buffer.read().decode(errors="replace").strip()
    if not text:
        raise CommandError("there is no prompt: give one after the model, or on standard input.")
    return text


class Conversation:
    """A conversation with a model, and the connection to the core that answers.

    Args:
        values: The command line.
        core: The settings of the core, for where models are.
    """

    def __init__(self, values: argparse.Namespace, core: Settings) -> None:
        self._values = values
        self._core = core
        self._stack = AsyncExitStack()
        self._client: AsyncOsaurus | None = None
        self._own_core: Child | None = None
        self._turns: list[tuple[str, str]] = []
        self.model_id = ""

    async def open(self) -> None:
        """Find or fetch the model, then find or start a core."""
        self.model_id = (await ensure_installed(self._values.model, self._core)).id
        servers = runtime.running_servers(self._core.models_dir)
        if servers:
            address, key = servers[0].grpc, api_key(self._values, self._core)
        else:
            address, key = await self._start_core()
        from osaurus_grpc.client import AsyncOsaurus  # after the core was started: gRPC dislikes forks

        self._client = await self._stack.enter_async_context(AsyncOsaurus(address, key))

    async def _start_core(self) -> tuple[str, str]:
        key = secrets.token_urlsafe(24)
        arguments = [
            "--host=127.0.0.1",
            "--grpc-port=0",
            f"--models-dir={self._core.models_dir}",
            "--share-models-dir",
            "--max-concurrent-requests=0",
            "--requests-per-minute=0",
            "--log-level=error",
        ]
        if self._values.config:
            arguments.append(f"--config={self._values.config}")
        environment = {"OSAURUS_API_KEY": key}
        is_quiet = not os.environ.get("OSAURUS_DEBUG")
        child = Child("the gRPC core", "osaurus_grpc", arguments, environment, is_quiet=is_quiet)
        self._own_core = child
        self._stack.push_async_callback(child.stop, _STOP_SECONDS)
        try:
            return await child.start(), key
        except ChildEndedError as error:
            raise CommandError(f"{error}; its message is above.") from None

    async def close(self) -> None:
        """End the connection and the core, if it is ours."""
        await self._stack.aclose()

    async def load(self) -> None:
        """Load the model now, so that the first answer does not wait for that."""
        assert self._client is not None, "open"
        await self._client.load_model(self.model_id)

    def forget(self) -> None:
        """Begin a new conversation."""
        self._turns.clear()

    async def ask(self, text: str) -> None:
        """Print the answer as it comes. What was printed stays in the history, however it ended.

        Raises:
            OsaurusError: It ended badly; the question is forgotten where nothing was answered.
        """
        self._turns.append(("user", text))
        parts: list[str] = []
        finish_reason = 0
        try:
            finish_reason = await self._print_answer(parts)
        finally:
            if parts:
                print(flush=True)
                self._turns.append(("assistant", "".join(parts)))
            else:
                self._turns.pop()
        _tell_if_cut_off(finish_reason)

    async def _print_answer(self, parts: list[str]) -> int:
        """Print deltas, collect them in parts, return the finish reason."""
        assert self._client is not None, "open"
        finish_reason = 0
        async with aclosing(self._client.chat_stream(self._request())) as events:
            async for event in events:
                match event.WhichOneof("event"):
                    case "content":
                        parts.append(event.content.text)
                        sys.stdout.write(event.content.text)
                        sys.stdout.flush()
                    case "choice_finished":
                        finish_reason = event.choice_finished.finish_reason
                    case _:
                        pass
        return finish_reason

    def _request(self) -> ChatRequest:
        from osaurus_grpc.v1 import chat_pb2

        roles = {
            "system": chat_pb2.ROLE_SYSTEM,
            "user": chat_pb2.ROLE_USER,
            "assistant": chat_pb2.ROLE_ASSISTANT,
        }
        system = [("system", self._values.system)] if self._values.system else []
        request = chat_pb2.ChatRequest(model=self.model_id)
        for role, text in (*system, *self._turns):
            request.messages.add(role=roles[role], content=[chat_pb2.ContentPart(text=text)])
        if self._values.temperature is not None:
            request.sampling.temperature = self._values.temperature
        if self._values.max_tokens is not None:
            request.sampling.max_tokens = self._values.max_tokens
        if self._values.seed is not None:
            request.sampling.seed = self._values.seed
        return request


def _tell_if_cut_off(finish_reason: int) -> None:
    from osaurus_grpc.v1.sampling_pb2 import FinishReason

    match finish_reason:
        case FinishReason.FINISH_REASON_LENGTH:
            note("the answer reached its longest length; --max-tokens allows more.")
        case FinishReason.FINISH_REASON_CONTEXT_LENGTH:
            note("the model's context is full.")


def _chat(runner: asyncio.Runner, conversation: Conversation) -> None:
    """Read questions and print answers until the person ends it."""
    note(f"loading {conversation.model_id}.")
    runner.run(conversation.load())
    note(_CHAT_HINT)
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and a history)
    while True:
        try:
            text = input(">>> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            note(_CHAT_HINT)
            continue
        match text:
            case "":
                continue
            case "/bye":
                return
            case "/clear":
                conversation.forget()
            case "/help" | "/?":
                note(_CHAT_HINT)
            case _:
                _answer(runner, conversation, text)


def _answer(runner: asyncio.Runner, conversation: Conversation, text: str) -> None:
    try:
        runner.run(conversation.ask(text))
    except KeyboardInterrupt:
        note("stopped.")
    except OsaurusError as error:
        note(error.message)
