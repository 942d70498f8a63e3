"""Models as Anthropic lists them; pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from osaurus_grpc.v1 import model_pb2
from rest_shim.errors import Refusal

DEFAULT_LIMIT = 20
MAX_LIMIT = 1000


def model_json(model: model_pb2.Model) -> dict[str, object]:
    """One model."""
    context_length = model.context_length or None
    return {
        "type": "model",
        "id": model.id,
        "display_name": model.repo_id or model.id,
        "created_at": model.modify_time.ToJsonString(),
        "lifecycle": "active",
        "deprecated_at": None,
        "retires_at": None,
        "line": None,
        "max_input_tokens": context_length,
        "max_tokens": context_length,
        "capabilities": None,
    }


def page_json(models: Sequence[model_pb2.Model], query: Mapping[str, str]) -> dict[str, object]:
    """One page of the list.

    Args:
        models: All models, in the order of their ids.
        query: The URL's query: limit, and after_id or before_id, which exclude the model they name.

    Raises:
        Refusal: The limit is none, or a cursor names no model.
    """
    limit = _limit(query.get("limit", ""))
    before, after = query.get("before_id", ""), query.get("after_id", "")
    if before and after:
        raise Refusal(400, "'before_id' and 'after_id' exclude each other.", param="before_id")
    if before:
        end = _position(models, before, "before_id")
        start = max(0, end - limit)
        has_more = start > 0
    else:
        start = _position(models, after, "after_id") + 1 if after else 0
        end = min(len(models), start + limit)
        has_more = end < len(models)
    page = models[start:end]
    return {
        "data": [model_json(model) for model in page],
        "has_more": has_more,
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
    }


def _limit(text: str) -> int:
    if not text:
        return DEFAULT_LIMIT
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_LIMIT))):
        raise Refusal(400, f"'limit' must be a whole number of 1 to {MAX_LIMIT}.", param="limit")
    limit = int(text)
    if not 1 <= limit <= MAX_LIMIT:
        raise Refusal(400, f"'limit' must be a whole number of 1 to {MAX_LIMIT}.", param="limit")
    return limit


def _position(models: Sequence[model_pb2.Model], name: str, param: str) -> int:
    for index, model in enumerate(models):
        if model.id == name:
            return index
    raise Refusal(400, f"'{param}' names no model of this server.", param=param)
