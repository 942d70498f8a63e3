"""Model names in Ollama's words: what is said of one that is missing, malformed or unknown."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rest_shim.errors import CoreError, Refusal, refusal_from_core

# Ollama's own form of a name, [host/][namespace/]model[:tag]. Names of other forms can be names here,
# so a name is called invalid only where there is no such model.
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,79}"
_NAME = re.compile(rf"(?:(?:[A-Za-z0-9_][A-Za-z0-9_.:\-]{{0,349}}/)?{_PART}/)?{_PART}(?::{_PART})?", re.ASCII)


def required(name: str) -> str:
    """The name.

    Raises:
        Refusal: There is none.
    """
    if not name:
        raise Refusal(400, "model is required", param="model")
    return name


def with_tag(name: str) -> str:
    """The name in full, as /show says it."""
    return name if ":" in name else f"{name}:latest"


def unknown(name: str, text: str = "model '{}' not found") -> Refusal:
    """What is said of a model that there is not."""
    if name and not _NAME.fullmatch(name):
        return Refusal(400, "invalid model name", param="model")
    return Refusal(404, text.format(name), code="model_not_found")


@asynccontextmanager
async def model_errors(
    name: str, text: str = "model '{}' not found", json_path: Callable[[str], str] = str
) -> AsyncIterator[None]:
    """Says the core's errors in Ollama's terms.

    Args:
        name: The model's.
        text: What is said where there is no such model; clients look for the words.
        json_path: The place in Ollama's JSON of a field of the protobuf request.
    """
    try:
        yield
    except CoreError as error:
        if error.reason == "MODEL_NOT_FOUND":
            raise unknown(name, text) from error
        raise refusal_from_core(error, json_path) from error
