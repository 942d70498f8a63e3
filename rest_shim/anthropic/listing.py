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
        query: The URL's query: limit, and after_id and before_id, between which the page lies. They need not
            name models: one may be gone since the page before.

    Raises:
        Refusal: The limit is none.
    """
    limit = _limit(query.get("limit", ""))
    before, after = query.get("before_id", ""), query.get("after_id", "")
    between = [model for model in models if after < model.id and (not before or model.id < before)]
    # Towards the start of the list where only its end is given.
    page = between[-limit:] if before and not after else between[:limit]
    has_more = len(between) > len(page)
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
