"""Embedding vectors through a real core: a real encoder, tiny encoders with random weights, a decoder."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import save_file

from osaurus_grpc.v1 import completion_pb2, embedding_pb2
from tests.conftest import MINILM
from tests.server.cores import TINY, chat_request, failure, inference_stub, running_core, stream_request

ROBERTA = "tiny-roberta"
HIDDEN, LAYERS, FEED_FORWARD, POSITIONS = 32, 2, 64, 66


def vectors(response: embedding_pb2.EmbedResponse) -> np.ndarray:
    assert [each.index for each in response.embeddings] == list(range(len(response.embeddings)))
    return np.array([list(each.values) for each in response.embeddings], dtype=np.float32)


@pytest.fixture
async def minilm(minilm_dir: Path):
    async with running_core(minilm_dir) as core, inference_stub(core.address) as stub:
        yield stub


async def test_a_real_model_gives_its_published_vectors(minilm):
    response = await minilm.Embed(
        embedding_pb2.EmbedRequest(
            model=MINILM, inputs=["This is an example sentence", "Each sentence is converted"]
        )
    )
    values = vectors(response)
    assert values.shape == (2, 384)
    # sentence-transformers' own output, from the model card of all-MiniLM-L6-v2.
    assert values[0, :4] == pytest.approx([0.0676569, 0.0634959, 0.0487131, 0.0793049], abs=1e-5)
    assert np.linalg.norm(values, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert response.model == MINILM
    assert response.usage.prompt_tokens == 7 + 6
    assert response.timings.total_duration.ToNanoseconds() > 0


async def test_meaning_is_near_and_padding_changes_nothing(minilm):
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply on Monday " * 6]
    together = vectors(await minilm.Embed(embedding_pb2.EmbedRequest(inputs=texts, model=MINILM)))
    alone = [
        vectors(await minilm.Embed(embedding_pb2.EmbedRequest(inputs=[text], model=MINILM)))[0]
        for text in texts
    ]
    assert together == pytest.approx(np.array(alone), abs=1e-5)
    assert together[0] @ together[1] > 0.5 > 0.2 > together[0] @ together[2]


async def test_many_inputs_come_back_in_order(minilm):
    texts = [f"number {i} " * (1 + i * 7 % 40) for i in range(60)]
    many = vectors(await minilm.Embed(embedding_pb2.EmbedRequest(inputs=texts, model=MINILM)))
    for i in (0, 17, 59):
        one = vectors(await minilm.Embed(embedding_pb2.EmbedRequest(inputs=[texts[i]], model=MINILM)))
        assert many[i] == pytest.approx(one[0], abs=1e-5)


async def test_dimensions_are_cut_and_scaled_again(minilm):
    whole = embedding_pb2.EmbedRequest(inputs=["hello"], model=MINILM)
    cut = embedding_pb2.EmbedRequest(inputs=["hello"], model=MINILM, dimensions=64)
    raw = embedding_pb2.EmbedRequest(inputs=["hello"], model=MINILM, normalize=False)
    (a,), (b,), (c,) = [vectors(await minilm.Embed(request)) for request in (whole, cut, raw)]
    assert b == pytest.approx(a[:64] / np.linalg.norm(a[:64]), abs=1e-5)
    assert np.linalg.norm(c) != pytest.approx(1.0, abs=1e-3)
    assert c / np.linalg.norm(c) == pytest.approx(a, abs=1e-5)


async def test_token_inputs_are_taken_as_they_are(minilm):
    text = vectors(await minilm.Embed(embedding_pb2.EmbedRequest(inputs=["hello world"], model=MINILM)))
    ids = [101, 7592, 2088, 102]  # [CLS] hello world [SEP]
    request = embedding_pb2.EmbedRequest(
        token_inputs=[completion_pb2.TokenPrompt(token_ids=ids)], model=MINILM
    )
    assert vectors(await minilm.Embed(request)) == pytest.approx(text, abs=1e-6)


async def test_a_long_input_is_refused_or_cut(minilm):
    text = "word " * 700
    refused = await failure(minilm.Embed(embedding_pb2.EmbedRequest(inputs=["short", text], model=MINILM)))
    assert refused.info.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert refused.info.metadata["limit"] == "512"
    assert refused.message == "inputs[1] has 702 tokens; the model's context holds 512."
    response = await minilm.Embed(
        embedding_pb2.EmbedRequest(inputs=["short", text], model=MINILM, truncate=True)
    )
    assert response.usage.prompt_tokens == 3 + 512
    cut = await minilm.Embed(embedding_pb2.EmbedRequest(inputs=["word " * 510], model=MINILM))
    assert vectors(response)[1] == pytest.approx(vectors(cut)[0], abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "inputs"),
        ({"inputs": ["a"] * 2049}, "inputs"),
        ({"inputs": ["a", ""]}, "inputs[1]"),
        ({"inputs": ["a"], "dimensions": 0}, "dimensions"),
        ({"inputs": ["a"], "dimensions": 385}, "dimensions"),
        ({"token_inputs": [completion_pb2.TokenPrompt()]}, "token_inputs[0]"),
        (
            {"token_inputs": [completion_pb2.TokenPrompt(token_ids=[5, 30522])]},
            "token_inputs[0].token_ids[1]",
        ),
        ({"inputs": ["a"], "token_inputs": [completion_pb2.TokenPrompt(token_ids=[5])]}, "token_inputs"),
    ],
)
async def test_what_is_wrong_is_named(minilm, fields, field):
    refused = await failure(minilm.Embed(embedding_pb2.EmbedRequest(model=MINILM, **fields)))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert field in refused.fields


async def test_an_encoder_does_not_generate(minilm):
    for call in (
        minilm.Chat(chat_request("hello", model=MINILM)),
        minilm.Complete(completion_pb2.CompleteRequest(model=MINILM, text="hello")),
    ):
        refused = await failure(call)
        assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
        assert refused.info.reason == "UNSUPPORTED_CAPABILITY"


async def test_a_decoder_embeds_beside_its_streams(tiny_dir: Path):
    async with running_core(tiny_dir) as core, inference_stub(core.address) as stub:
        request = embedding_pb2.EmbedRequest(model=TINY, inputs=["one", "quite another text"])
        quiet = vectors(await stub.Embed(request))
        stream = stub.ChatStream(stream_request(chat_request(max_tokens=300)))
        reader = asyncio.ensure_future(_drained(stream))
        assert vectors(await stub.Embed(request)) == pytest.approx(quiet, abs=1e-5)
        await reader
        alone = vectors(await stub.Embed(embedding_pb2.EmbedRequest(model=TINY, inputs=["one"])))
        assert alone[0] == pytest.approx(quiet[0], abs=1e-5)
        assert abs(float(quiet[0] @ quiet[1])) < 0.99


async def _drained(stream: Any) -> None:
    async for _ in stream:
        pass


def build_roberta(target: Path, tokenizer_from: Path, pooling: str) -> dict[str, np.ndarray]:
    """A tiny XLM-RoBERTa with random weights under transformers' names; returns the weights."""
    target.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy2(tokenizer_from / name, target / name)
    config = {
        "model_type": "xlm-roberta", "vocab_size": 30522, "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": FEED_FORWARD,
        "max_position_embeddings": POSITIONS, "type_vocab_size": 1, "pad_token_id": 1,
        "layer_norm_eps": 1e-5, "hidden_act": "gelu",
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling" / "config.json").write_text(json.dumps({pooling: True}))
    random = np.random.default_rng(3)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32) * 0.3

    weights = {
        "roberta.embeddings.word_embeddings.weight": normal(30522, HIDDEN),
        "roberta.embeddings.position_embeddings.weight": normal(POSITIONS, HIDDEN),
        "roberta.embeddings.token_type_embeddings.weight": normal(1, HIDDEN),
        "roberta.embeddings.position_ids": np.arange(POSITIONS, dtype=np.int64)[None],
        "lm_head.bias": normal(30522),
    }
    norms = ["roberta.embeddings.LayerNorm"]
    for layer in range(LAYERS):
        prefix = f"roberta.encoder.layer.{layer}."
        for name, outputs, inputs in (
            ("attention.self.query", HIDDEN, HIDDEN), ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN), ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", FEED_FORWARD, HIDDEN), ("output.dense", HIDDEN, FEED_FORWARD),
        ):  # fmt: skip
            weights[f"{prefix}{name}.weight"] = normal(outputs, inputs)
            weights[f"{prefix}{name}.bias"] = normal(outputs)
        norms += [f"{prefix}attention.output.LayerNorm", f"{prefix}output.LayerNorm"]
    for norm in norms:
        weights |= {f"{norm}.weight": 1 + normal(HIDDEN), f"{norm}.bias": normal(HIDDEN)}
    save_file(weights, target / "model.safetensors")
    return weights


def reference_states(weights: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """RoBERTa's hidden states in numpy, after the paper and transformers' names. Shape (tokens, HIDDEN)."""
    from math import erf

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(ids), 4, HIDDEN // 4).transpose(1, 0, 2)

    tables = "roberta.embeddings."
    x = weights[f"{tables}word_embeddings.weight"][ids]
    x = x + weights[f"{tables}position_embeddings.weight"][2 : 2 + len(ids)]  # padding_idx is 1
    x = norm(f"{tables}LayerNorm", x + weights[f"{tables}token_type_embeddings.weight"][0])
    for layer in range(LAYERS):
        prefix = f"roberta.encoder.layer.{layer}."
        q, k, v = (heads(linear(f"{prefix}attention.self.{part}", x)) for part in ("query", "key", "value"))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(HIDDEN // 4)
        exponents = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (exponents / exponents.sum(-1, keepdims=True)) @ v
        mixed = mixed.transpose(1, 0, 2).reshape(len(ids), HIDDEN)
        x = norm(f"{prefix}attention.output.LayerNorm", linear(f"{prefix}attention.output.dense", mixed) + x)
        inner = linear(f"{prefix}intermediate.dense", x)
        inner = inner * 0.5 * (1 + np.vectorize(erf)(inner / np.sqrt(2)))
        x = norm(f"{prefix}output.LayerNorm", linear(f"{prefix}output.dense", inner) + x)
    return np.asarray(x, dtype=np.float32)


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ("pooling_mode_mean_tokens", lambda states: states.mean(0)),
        ("pooling_mode_cls_token", lambda states: states[0]),
        ("pooling_mode_lasttoken", lambda states: states[-1]),
    ],
)
async def test_roberta_and_every_pooling_agree_with_numpy(tmp_path, minilm_dir, pooling, pool):
    weights = build_roberta(tmp_path / ROBERTA, minilm_dir / MINILM, pooling)
    inputs = [[5, 17, 99, 1024, 7], [12, 900]]
    async with running_core(tmp_path) as core, inference_stub(core.address) as stub:
        response = await stub.Embed(
            embedding_pb2.EmbedRequest(
                model=ROBERTA,
                token_inputs=[completion_pb2.TokenPrompt(token_ids=ids) for ids in inputs],
                normalize=False,
            )
        )
        expected = np.array([pool(reference_states(weights, ids)) for ids in inputs])
        assert vectors(response) == pytest.approx(expected, abs=1e-4)
        # Positions begin behind the padding index: 64 of the 66 are usable.
        too_long = completion_pb2.TokenPrompt(token_ids=[5] * 65)
        refused = await failure(
            stub.Embed(embedding_pb2.EmbedRequest(model=ROBERTA, token_inputs=[too_long]))
        )
        assert refused.info.metadata["limit"] == "64"


@pytest.mark.parametrize("damage", ["a missing weight", "positions that are not absolute"])
async def test_an_encoder_that_cannot_be_computed_is_unusable(tmp_path, minilm_dir, damage):
    folder = tmp_path / ROBERTA
    weights = build_roberta(folder, minilm_dir / MINILM, "pooling_mode_mean_tokens")
    if damage == "a missing weight":
        del weights["roberta.encoder.layer.1.output.dense.bias"]
        save_file(weights, folder / "model.safetensors")
    else:
        config = json.loads((folder / "config.json").read_text())
        config["position_embedding_type"] = "relative_key"
        (folder / "config.json").write_text(json.dumps(config))
    async with running_core(tmp_path) as core, inference_stub(core.address) as stub:
        refused = await failure(stub.Embed(embedding_pb2.EmbedRequest(model=ROBERTA, inputs=["hello"])))
        assert refused.info.reason == "MODEL_UNUSABLE"
