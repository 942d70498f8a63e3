"""What a model folder's files tell about the model: sizes, quantization, capabilities, digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from osaurus_grpc.models.inspection import IncompleteModelError, ModelFolder, architecture, read_json_object
from osaurus_grpc.models.vision import families
from osaurus_grpc.models.weights import TensorInfo, dominant_dtype
from osaurus_grpc.models.weights import parameter_count as count_parameters

# Files up to this size are part of the digest by content, larger ones by size and time.
DIGESTED_FILE_BYTES = 2**20

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
    "model_max_length",
)
_WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim", "model_dim")
_NESTED_CONFIGS = ("text_config", "llm_config", "language_config")
_EMBEDDING_ARCHITECTURES = re.compile(
    r".*bert.*|mpnet|xlm-roberta.*|roberta|electra|deberta.*|gte|new|model2vec|e5.*", re.IGNORECASE
)
_THINK_MARKS = ("<think>", "</think>", "<longcat_think>", "<seed:think>", "[THINK]", "<|START_THINKING|>",
                "<|think:start|>", "<|channel|>", "<|channel>", "<|inner_prefix|>", "<think:opensource>",
                "<mm:think>", "[BEGIN FINAL RESPONSE]")  # fmt: skip


class Capability(Enum):
    """What a model can do."""

    CHAT = "chat"
    COMPLETION = "completion"
    TOOLS = "tools"
    REASONING = "reasoning"
    VISION = "vision"
    EMBEDDING = "embedding"


def context_length(config: Mapping[str, object]) -> int:
    """Tokens of context by config.json, or 0."""
    return _first_integer(config, _CONTEXT_KEYS)


def embedding_length(config: Mapping[str, object]) -> int:
    """Width of the hidden state by config.json, or 0."""
    return _first_integer(config, _WIDTH_KEYS)


def _first_integer(config: Mapping[str, object], keys: tuple[str, ...]) -> int:
    """The first positive integer under a key, also in a nested text configuration."""
    nested = [config.get(name) for name in _NESTED_CONFIGS]
    for level in (config, *(each for each in nested if isinstance(each, dict))):
        for key in keys:
            value = level.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
                return value
    return 0


def parameter_count(folder: ModelFolder) -> int:
    """Weights of the model, packed ones unpacked."""
    return count_parameters(_tensors(folder), _group_sizes(folder.config))


def quantization(folder: ModelFolder) -> str:
    """How most weights are stored: "4bit", "mxfp4", "bf16", "f32", ….

    A converted GGUF carries the name of its source's scheme in config.json under
    osaurus.quantization; a folder of MLX has quantization.bits; otherwise the dtype counts.
    """
    origin = folder.config.get("osaurus")
    if isinstance(origin, dict) and isinstance(origin.get("quantization"), str) and origin["quantization"]:
        return str(origin["quantization"])
    scheme = _scheme(folder.config)
    mode = scheme.get("mode")
    if isinstance(mode, str) and mode != "affine":
        return mode
    bits = scheme.get("bits")
    if isinstance(bits, int):
        return f"{bits}bit"
    return dominant_dtype(_tensors(folder).values())


def _tensors(folder: ModelFolder) -> dict[str, TensorInfo]:
    return {name: tensor for header in folder.weights.values() for name, tensor in header.tensors.items()}


def _scheme(config: Mapping[str, object]) -> Mapping[str, object]:
    for key in ("quantization", "quantization_config"):
        scheme = config.get(key)
        if isinstance(scheme, dict):
            return scheme
    return {}


def _group_sizes(config: Mapping[str, object]) -> dict[str, int]:
    """Module path to quantization group size; "" is the model's default."""
    sizes: dict[str, int] = {}
    scheme = _scheme(config)
    for module, value in (("", scheme), *scheme.items()):
        if isinstance(value, Mapping) and isinstance(size := value.get("group_size"), int):
            sizes[module] = size
    return sizes


def capabilities(config: Mapping[str, object], template: str) -> frozenset[Capability]:
    """What the architecture and the chat template allow."""
    if _EMBEDDING_ARCHITECTURES.fullmatch(architecture(config)):
        return frozenset({Capability.EMBEDDING})
    found = {Capability.COMPLETION}
    if template:
        found.add(Capability.CHAT)
        # A template that knows of no tools gets them in the system message.
        found.add(Capability.TOOLS)
        if any(mark in template for mark in _THINK_MARKS):
            found.add(Capability.REASONING)
        if families.family_of(config) is not None and families.is_installed():
            found.add(Capability.VISION)
    return frozenset(found)


def chat_template(path: Path) -> str:
    """A folder's chat template (Jinja), or "" where it has none.

    Looked for as transformers does: chat_template.jinja, chat_template.json, tokenizer_config.json;
    of several named ones "default", else the first.
    """
    try:
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError):
        pass
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            template = read_json_object(path / name).get("chat_template")
        except (OSError, IncompleteModelError):
            continue
        if text := _template_text(template):
            return text
    return ""


def _template_text(template: object) -> str:
    if isinstance(template, str):
        return template
    named: dict[str, str] = {}
    if isinstance(template, dict):
        named = {str(name): text for name, text in template.items() if isinstance(text, str)}
    elif isinstance(template, list):
        named = {
            str(each.get("name")): each["template"]
            for each in template
            if isinstance(each, dict) and isinstance(each.get("template"), str)
        }
    return named.get("default") or next(iter(named.values()), "")


def digest(folder: ModelFolder) -> str:
    """A sha256 over the model's files, 64 hexadecimal digits.

    Reading gigabytes for a listing would take seconds, so weights count by name, size, modification
    time and header, other files up to DIGESTED_FILE_BYTES by content, larger ones by size and time.
    The Hugging Face cache names its blobs by their sha256, which then stands for size and time. So
    the digest is the same after a restart and changes with every weight that is written.
    """
    lines = []
    for file in folder.files:
        path = folder.path / file.name
        header = folder.weights.get(file.name)
        if header is not None:
            lines.append([file.name, _content_name(path) or [file.size, file.mtime_ns], header.sha256])
        elif file.size <= DIGESTED_FILE_BYTES:
            lines.append([file.name, _content_hash(path)])
        else:
            lines.append([file.name, _content_name(path) or [file.size, file.mtime_ns]])
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _content_name(path: Path) -> str:
    """The sha256 that a blob of the Hugging Face cache is named by, or ""."""
    name = path.resolve().name if path.is_symlink() else ""
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else ""


def _content_hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
