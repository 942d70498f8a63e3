from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from mlx_lm.utils import load, load_model

from osaurus_grpc.errors import DiskFullError, SourceInvalidError
from osaurus_grpc.models.platform import mx
from osaurus_grpc.models.sources.gguf import ConvertProgress, convert
from tests.models.gguf import files
from tests.models.gguf.files import HEAD, HIDDEN, TinyModel, encoded

Kind = GGMLQuantizationType

TOKENS = mx.array([[1, 20, 44, 7, 150, 90, 3, 3, 61, 12, 200, 33, 2]])


def converted(model: TinyModel, folder: Path) -> Path:
    source = model.write(folder / "tiny.gguf")
    target = folder / "model"
    target.mkdir()
    convert(source, target)
    return target


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def logits(folder: Path) -> np.ndarray:
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(TOKENS))


def save_reference(folder: Path, weights: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    folder.mkdir()
    mx.save_safetensors(
        str(folder / "model.safetensors"), {name: mx.array(values) for name, values in weights.items()}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


GEMMA3 = {"query_pre_attn_scalar": HEAD, "sliding_window": 8, "sliding_window_pattern": 2}

QWEN3_MOE = {
    "num_experts": files.EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": files.EXPERT_FEED_FORWARD,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


def reference_config(architecture: str, **more: Any) -> dict[str, Any]:
    """A config written by hand in Hugging Face's words, not by the converter."""
    return {
        "model_type": {"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe"}.get(architecture, architecture),
        "hidden_size": HIDDEN,
        "num_hidden_layers": files.LAYERS,
        "intermediate_size": files.FEED_FORWARD,
        "num_attention_heads": files.HEADS,
        "num_key_value_heads": files.KV_HEADS,
        "head_dim": HEAD,
        "rms_norm_eps": 1e-5,
        "vocab_size": files.VOCABULARY,
        "max_position_embeddings": 512,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        **{"gemma3": GEMMA3, "qwen3moe": QWEN3_MOE}.get(architecture, {}),
        **more,
    }


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "qwen3moe", "gemma3"])
def test_a_converted_model_computes_what_its_original_does(architecture, tied, tmp_path):
    model = TinyModel(architecture, tied=tied)
    folder = converted(model, tmp_path)
    config = reference_config(architecture, tie_word_embeddings=tied)
    reference = save_reference(tmp_path / "reference", model.weights(), config)
    expected = logits(reference)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits(folder), expected, atol=2e-5)
    made = config_of(folder)
    assert made["tie_word_embeddings"] is tied
    assert "quantization" not in made


def test_llama_with_attention_biases(tmp_path):
    model = TinyModel("llama")
    random = np.random.default_rng(5)
    sizes = {"q": files.HEADS * HEAD, "k": files.KV_HEADS * HEAD, "v": files.KV_HEADS * HEAD, "o": HIDDEN}
    biases = {
        f"model.layers.{layer}.self_attn.{name}_proj.bias": random.standard_normal(size).astype(np.float32)
        for layer in range(files.LAYERS)
        for name, size in sizes.items()
    }
    for name, values in biases.items():
        heads = {"q_proj": files.HEADS, "k_proj": files.KV_HEADS}.get(name.split(".")[-2], 0)
        model.extra[model.gguf_name(name)] = files.permuted(values, heads) if heads else values
    folder = converted(model, tmp_path)
    config = reference_config("llama", attention_bias=True)
    reference = save_reference(tmp_path / "reference", model.weights() | biases, config)
    np.testing.assert_allclose(logits(folder), logits(reference), atol=2e-5)


QUANTIZED = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q4_K",
    "Q5_K",
    "MXFP4",
    "Q6_K",
    "Q2_K",
    "IQ4_XS",
    "F16",
    "BF16",
)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_model_computes_what_its_dequantized_weights_do(kind, tmp_path):
    model = TinyModel("llama", tied=True)
    stored = model.stored()
    model.kinds = {name: Kind[kind] for name, values in stored.items() if values.ndim == 2}
    folder = converted(model, tmp_path)
    # The same blocks, dequantized by the gguf package, in a GGUF of float32.
    dense = TinyModel("llama", tied=True)
    dense.extra = {
        name: quants.dequantize(encoded(stored[name], Kind[kind]), Kind[kind]) for name in model.kinds
    }
    (tmp_path / "dense").mkdir()
    expected = logits(converted(dense, tmp_path / "dense"))
    is_exact = kind not in ("Q6_K", "Q2_K", "IQ4_XS")
    error = np.sqrt(((logits(folder) - expected) ** 2).mean()) / expected.std()
    assert error < (1e-5 if is_exact else 0.04)
    origin = config_of(folder)["osaurus"]
    assert (origin["format"], origin["quantization"]) == ("gguf", kind)
    assert origin["parameter_count"] == sum(values.size for values in stored.values())
    assert origin["is_exact"] is is_exact


def test_experts_are_repacked_as_one(tmp_path):
    name = "blk.1.ffn_down_exps.weight"
    model = TinyModel("qwen3moe", kinds={name: Kind.Q4_K})
    folder = converted(model, tmp_path)
    weights = mx.load(str(folder / "model.safetensors"))
    path = "model.layers.1.mlp.switch_mlp.down_proj"
    shape = model.stored()[name].shape
    values = mx.dequantize(
        weights[f"{path}.weight"], weights[f"{path}.scales"], weights[f"{path}.biases"], group_size=32, bits=4
    )
    expected = quants.dequantize(encoded(model.stored()[name], Kind.Q4_K), Kind.Q4_K)
    assert values.shape == shape
    np.testing.assert_array_equal(np.array(values), expected.reshape(shape))
    assert np.isfinite(logits(folder)).all()


def test_every_module_keeps_its_own_bits(tmp_path):
    model = TinyModel("llama", metadata={"general.file_type": 15})
    model.kinds = {
        "token_embd.weight": Kind.Q8_0,
        "output.weight": Kind.Q6_K,
        "blk.0.attn_q.weight": Kind.Q4_K,
        "blk.0.attn_k.weight": Kind.Q4_K,
        "blk.0.ffn_down.weight": Kind.Q5_K,
        "blk.1.ffn_up.weight": Kind.F16,
    }
    folder = converted(model, tmp_path)
    config = config_of(folder)
    quantization = config["quantization"]
    assert quantization["model.embed_tokens"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert quantization["lm_head"]["bits"] == 8
    assert quantization["model.layers.0.self_attn.q_proj"]["bits"] == 4
    assert quantization["model.layers.0.mlp.down_proj"]["bits"] == 5
    assert "model.layers.1.mlp.up_proj" not in quantization
    assert config["osaurus"]["quantization"] == "Q4_K_M"
    weights = mx.load(str(folder / "model.safetensors"))
    assert weights["model.layers.1.mlp.up_proj.weight"].dtype == mx.float16
    assert np.isfinite(logits(folder)).all()


def test_bfloat16_stays_bfloat16_bit_for_bit(tmp_path):
    model = TinyModel("llama", kinds={"blk.0.ffn_up.weight": Kind.BF16})
    weights = mx.load(str(converted(model, tmp_path) / "model.safetensors"))
    stored = weights["model.layers.0.mlp.up_proj.weight"]
    assert stored.dtype == mx.bfloat16
    raw = encoded(model.stored()["blk.0.ffn_up.weight"], Kind.BF16)
    np.testing.assert_array_equal(np.array(stored.view(mx.uint16)), raw.view(np.uint16).reshape(stored.shape))


def test_reports_progress_to_the_end(tmp_path):
    source = TinyModel().write(tmp_path / "tiny.gguf")
    (tmp_path / "model").mkdir()
    reports: list[ConvertProgress] = []
    convert(source, tmp_path / "model", report=reports.append, name="Tiny")
    done = [report.completed_bytes for report in reports]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == reports[-1].total_bytes > 0
    assert reports[0].file in TinyModel().stored()
    assert config_of(tmp_path / "model")["osaurus"]["name"] == "Tiny"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_says_so(tmp_path):
    source = TinyModel().write(tmp_path / "tiny.gguf")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(DiskFullError):
        convert(source, tmp_path / "model")


def llama3_factors(base: float, factor: float) -> np.ndarray:
    """As llama.cpp's conversion script makes them (conversion/llama.py)."""
    made = []
    for index in range(0, HEAD, 2):
        wavelength = 2 * math.pi * base ** (index / HEAD)
        if wavelength < 8192 / 4:
            made.append(1.0)
        elif wavelength > 8192:
            made.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            made.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(made, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rotary_factors_are_recognised(factor, tmp_path):
    model = TinyModel("llama", metadata={"llama.rope.freq_base": 500_000.0})
    model.extra["rope_freqs.weight"] = llama3_factors(500_000.0, factor)
    folder = converted(model, tmp_path)
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert config_of(folder)["rope_scaling"] == scaling
    config = reference_config("llama", rope_theta=500_000.0, rope_scaling=scaling)
    reference = save_reference(tmp_path / "reference", model.weights(), config)
    np.testing.assert_allclose(logits(folder), logits(reference), atol=2e-5)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
    ],
)
def test_rotary_scaling(metadata, expected, tmp_path):
    model = TinyModel("llama", metadata={f"llama.{key}": value for key, value in metadata.items()})
    folder = converted(model, tmp_path)
    assert config_of(folder).get("rope_scaling") == expected
    assert np.isfinite(logits(folder)).all()


@pytest.mark.parametrize("pattern", [2, [True, False]], ids=["number", "flags"])
def test_gemma3_settings(pattern, tmp_path):
    metadata = {
        "gemma3.attention.sliding_window_pattern": pattern,
        "gemma3.rope.freq_base": 1_000_000.0,
        "gemma3.rope.freq_base_swa": 20_000.0,
    }
    config = config_of(converted(TinyModel("gemma3", metadata=metadata), tmp_path))
    assert config["model_type"] == "gemma3_text"
    assert config["sliding_window"] == 8
    assert config["sliding_window_pattern"] == 2
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1_000_000.0, 20_000.0)
    assert config["query_pre_attn_scalar"] == HEAD


def test_the_folder_loads_with_its_tokenizer(tmp_path):
    folder = converted(TinyModel("qwen3"), tmp_path)
    model, tokenizer = load(str(folder))
    assert tokenizer.eos_token_ids == {0, 2}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    assert prompt[0] == 1
    assert tokenizer.decode(prompt) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert model(mx.array([prompt])).shape == (1, len(prompt), files.VOCABULARY)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def refusal(model: TinyModel, folder: Path) -> str:
    with pytest.raises(SourceInvalidError) as caught:
        converted(model, folder)
    return caught.value.message


REFUSED_SETTINGS = [
    ({"general.architecture": "mamba"}, "'mamba' cannot be converted; these can: llama, qwen2"),
    ({"split.count": 3}, "one of 3 parts"),
    ({"llama.block_count": None}, "llama.block_count is missing"),
    ({"llama.block_count": 0}, "llama.block_count is missing or out of range"),
    ({"llama.block_count": 3_000_000}, "llama.block_count is missing or out of range"),
    ({"llama.block_count": 3}, "tensor blk.2.attn_norm.weight is missing"),
    ({"llama.embedding_length": 128}, "has the shape"),
    ({"llama.embedding_length": "big"}, "llama.embedding_length is missing"),
    ({"llama.attention.head_count": [4, 8]}, "differs from block to block"),
    ({"llama.attention.head_count_kv": 3}, "does not fit"),
    ({"llama.attention.key_length": 63, "llama.attention.value_length": 63}, "does not fit"),
    ({"llama.attention.value_length": 32}, "value_length"),
    ({"llama.rope.dimension_count": 32}, "rope.dimension_count"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon"),
    ({"llama.rope.freq_base": -1.0}, "rope.freq_base"),
    ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "'longrope'"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, "original_context_length"),
    ({"llama.expert_count": 8}, "expert_count is set"),
    ({"llama.logit_scale": 0.5}, "logit_scale is set"),
]


@pytest.mark.parametrize(("metadata", "message"), REFUSED_SETTINGS)
def test_settings_that_cannot_be_converted_are_named(metadata, message, tmp_path):
    assert message in refusal(TinyModel(metadata=metadata), tmp_path)


def test_a_block_format_that_cannot_be_converted_is_named(tmp_path):
    model = TinyModel(kinds={"blk.0.attn_q.weight": Kind.TQ1_0})
    message = refusal(model, tmp_path)
    assert message == "Tensor blk.0.attn_q.weight is stored as TQ1_0, which cannot be converted."
    assert not list((tmp_path / "model").glob("*.safetensors"))


def test_a_quantized_norm_is_refused(tmp_path):
    message = refusal(TinyModel(kinds={"blk.0.attn_norm.weight": Kind.Q8_0}), tmp_path)
    assert "Tensor blk.0.attn_norm.weight is stored as Q8_0" in message


def test_a_missing_tensor_is_named(tmp_path):
    model = TinyModel(left_out=frozenset({"blk.1.ffn_up.weight"}))
    assert "tensor blk.1.ffn_up.weight is missing" in refusal(model, tmp_path)


def test_an_unknown_tensor_is_named(tmp_path):
    model = TinyModel(extra={"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    assert "Tensor blk.0.attn_sinks.weight is not part of" in refusal(model, tmp_path)


def test_biases_on_some_blocks_only_are_refused(tmp_path):
    model = TinyModel(extra={"blk.0.attn_q.bias": np.ones(HIDDEN, np.float32)})
    assert "tensor blk.0.attn_k.bias is missing" in refusal(model, tmp_path)


def test_rotary_factors_of_another_kind_are_refused(tmp_path):
    factors = np.linspace(1, 5, HEAD // 2).astype(np.float32)
    assert "rope_freqs.weight" in refusal(TinyModel(extra={"rope_freqs.weight": factors}), tmp_path)


def test_a_scale_that_is_not_a_number_is_refused(tmp_path):
    model = TinyModel()
    rows = encoded(model.stored()["blk.0.attn_v.weight"], Kind.Q4_0).copy()
    rows[3, 0:2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    source = model.write(tmp_path / "whole.gguf")
    assert source.exists()
    model.kinds["blk.0.attn_v.weight"] = Kind.Q4_0
    path = model.write(tmp_path / "broken.gguf")
    good = encoded(model.stored()["blk.0.attn_v.weight"], Kind.Q4_0).tobytes()
    data = path.read_bytes()
    assert data.count(good) == 1
    path.write_bytes(data.replace(good, rows.tobytes()))
    (tmp_path / "model").mkdir()
    with pytest.raises(SourceInvalidError, match=r"blk\.0\.attn_v\.weight has a scale that is not a number"):
        convert(path, tmp_path / "model")


def test_more_tokens_than_embeddings_is_refused(tmp_path):
    tokens = [*files.byte_level_tokens(), "<more>"]
    types = [*files.byte_level_metadata()["tokenizer.ggml.token_type"], 1]
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    assert "more tokens than embeddings" in refusal(TinyModel(metadata=metadata), tmp_path)


def test_a_chat_template_is_text_and_nothing_more(tmp_path):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    folder = converted(TinyModel(metadata={"tokenizer.chat_template": template}), tmp_path)
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == template
