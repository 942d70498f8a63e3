"""Models as Ollama lists them: /tags, /ps, /show; pure functions."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from osaurus_grpc.v1 import model_pb2

# What stands for "never" in expires_at: as far away as Ollama's. The last day of the year 9999 is none that
# clients east of Greenwich can turn into a time of their own.
NEVER = "2319-01-01T00:00:00Z"

_CAPABILITIES = {
    model_pb2.CAPABILITY_CHAT: "completion",
    model_pb2.CAPABILITY_COMPLETION: "completion",
    model_pb2.CAPABILITY_TOOLS: "tools",
    model_pb2.CAPABILITY_REASONING: "thinking",
    model_pb2.CAPABILITY_VISION: "vision",
    model_pb2.CAPABILITY_EMBEDDING: "embedding",
}


def parameter_size(count: int) -> str:
    """A number of weights as Ollama writes it, for example "134.52M"; "" where it is not known."""
    for unit, size, digits in (("B", 1e9, 1), ("M", 1e6, 2), ("K", 1e3, 0)):
        if count >= size:
            number = count / size
            return f"{number:.0f}{unit}" if number.is_integer() else f"{number:.{digits}f}{unit}"
    return str(count) if count else ""


def details_json(model: model_pb2.Model) -> dict[str, object]:
    """What kind of model it is."""
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": model.architecture,
        "families": [model.architecture] if model.architecture else [],
        "parameter_size": parameter_size(model.parameter_count),
        "quantization_level": model.quantization,
    }


def digest(model: model_pb2.Model) -> str:
    """The digest with its algorithm, as Osaurus's API reference shows it."""
    return f"sha256:{model.digest}"


def capabilities(model: model_pb2.Model) -> list[str]:
    """What it can do, in Ollama's words."""
    names = (_CAPABILITIES.get(capability, "") for capability in model.capabilities)
    return [name for name in dict.fromkeys(names) if name]


def tag_json(model: model_pb2.Model) -> dict[str, object]:
    """One model of /tags."""
    details = details_json(model)
    if model.context_length:
        details["context_length"] = model.context_length
    if model.embedding_length:
        details["embedding_length"] = model.embedding_length
    return {
        "name": model.id,
        "model": model.id,
        "modified_at": model.modify_time.ToJsonString(),
        "size": model.size_bytes,
        "digest": digest(model),
        "details": details,
        "capabilities": capabilities(model),
    }


def running_json(models: Iterable[model_pb2.Model]) -> dict[str, object]:
    """/ps: the models in memory, those that stay longest first.

    Each once, whatever second names it has: clients add up what they take.
    """
    loaded = [model for model in models if model.state == model_pb2.MODEL_STATE_LOADED and not model.alias_of]
    loaded.sort(key=lambda model: _expiry(model.expire_time), reverse=True)
    return {
        "models": [
            {
                "name": model.id,
                "model": model.id,
                "size": model.resident_bytes,
                "digest": digest(model),
                "details": details_json(model),
                "expires_at": _expiry(model.expire_time),
                # Memory of the CPU is none of a graphics card's.
                "size_vram": 0 if model.device == "cpu" else model.resident_bytes,
                "context_length": model.context_length,
            }
            for model in loaded
        ]
    }


def _expiry(expire_time: Timestamp) -> str:
    return min(expire_time.ToJsonString(), NEVER) if expire_time.seconds else NEVER


def show_json(model: model_pb2.Model) -> dict[str, object]:
    """/show: what is known of one model."""
    info: dict[str, object] = {
        "general.architecture": model.architecture,
        # What editors call the model in their menus.
        "general.basename": model.id,
    }
    if model.parameter_count:
        info["general.parameter_count"] = model.parameter_count
    if model.context_length:
        info[f"{model.architecture}.context_length"] = model.context_length
    if model.embedding_length:
        info[f"{model.architecture}.embedding_length"] = model.embedding_length
    return {
        "modelfile": _modelfile(model),
        "parameters": "",
        "template": model.chat_template,
        "details": details_json(model),
        "model_info": info,
        "capabilities": capabilities(model),
        "modified_at": model.modify_time.ToJsonString(),
    }


def _modelfile(model: model_pb2.Model) -> str:
    """What of a Modelfile there is to say; the template in it is Jinja, not Ollama's."""
    made = f"# Modelfile of {model.id}\nFROM {model.repo_id or model.id}\n"
    return f'{made}TEMPLATE """{model.chat_template}"""\n' if model.chat_template else made
