from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from osaurus_grpc.v1 import model_pb2
from rest_shim.ollama import listing

from ..scripted_core import MODEL, model


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (134_515_008, "134.52M"), (3_212_749_888, "3.2B"), (8_000_000_000, "8B"), (7_000_000, "7M"),
        (12_345, "12K"), (999, "999"), (0, ""),
    ],
)  # fmt: skip
def test_parameter_sizes(count: int, text: str) -> None:
    assert listing.parameter_size(count) == text


def test_a_model_of_the_tags() -> None:
    assert listing.tag_json(model()) == {
        "name": MODEL,
        "model": MODEL,
        "modified_at": "2024-03-15T10:30:45Z",
        "size": 2147483648,
        "digest": "sha256:" + "ab" * 32,
        "details": {
            "parent_model": "",
            "format": "safetensors",
            "family": "llama",
            "families": ["llama"],
            "parameter_size": "3.2B",
            "quantization_level": "4bit",
            "context_length": 131072,
            "embedding_length": 3072,
        },
        "capabilities": ["completion"],
    }


def test_running_models_are_the_loaded_ones_longest_first() -> None:
    soon, forever, idle = model("soon", is_loaded=True), model("forever", is_loaded=True), model("idle")
    soon.expire_time.FromJsonString("2026-11-22T13:10:50Z")
    running = listing.running_json([idle, soon, forever])["models"]
    assert isinstance(running, list)
    assert [entry["name"] for entry in running] == ["forever", "soon"]
    assert running[1]["expires_at"] == "2026-11-22T13:10:50Z"
    never = datetime.fromisoformat(running[0]["expires_at"])
    assert never.year > 2300
    # Clients show it in their own time.
    assert never.astimezone(timezone(timedelta(hours=14))) == never
    assert running[0]["size"] == running[0]["size_vram"] == 1_999_999_999


def test_a_running_model_is_listed_once_whatever_its_names() -> None:
    second = model("second", is_loaded=True)
    second.alias_of = "first"
    running = listing.running_json([model("first", is_loaded=True), second])["models"]
    assert isinstance(running, list)
    assert [entry["name"] for entry in running] == ["first"]


def test_a_model_on_the_cpu_takes_no_video_memory() -> None:
    here = model(is_loaded=True)
    here.device = "cpu"
    entry = listing.running_json([here])["models"]
    assert isinstance(entry, list)
    assert (entry[0]["size"], entry[0]["size_vram"]) == (1_999_999_999, 0)


def test_show() -> None:
    shown = model()
    shown.chat_template = "{{ messages }}"
    shown.capabilities.append(model_pb2.CAPABILITY_REASONING)
    made = listing.show_json(shown)
    assert made["template"] == "{{ messages }}"
    assert made["modelfile"] == (
        f'# Modelfile of {MODEL}\nFROM mlx-community/{MODEL}\nTEMPLATE """{{{{ messages }}}}"""\n'
    )
    assert made["capabilities"] == ["completion", "thinking"]
    assert made["model_info"] == {
        "general.architecture": "llama",
        "general.basename": MODEL,
        "general.parameter_count": 3_212_749_888,
        "llama.context_length": 131_072,
        "llama.embedding_length": 3072,
    }
