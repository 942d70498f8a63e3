"""Images in conversations, on tiny models of two families: what mlx-vlm itself answers is the measure."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pytest

from osaurus_grpc.models.vision import families
from osaurus_grpc.models.vision.families import FAMILIES
from osaurus_grpc.models.vision.picture import MAX_PIXELS
from osaurus_grpc.v1 import (
    chat_pb2,
    inference_service_pb2,
    inference_service_pb2_grpc,
    model_pb2,
    sampling_pb2,
)
from tests.harness.pictures import encoded, picture, png
from tests.harness.tiny_vision import LLAVA, QWEN2_VL, QWEN3_VL, SMOLVLM, placeholder
from tests.harness.tiny_vision import MODELS as ALL_MODELS
from tests.server.cores import inference_stub, running_core

MODELS = (SMOLVLM, QWEN2_VL, QWEN3_VL)
SECONDS = 60
TOKENS = 12


@pytest.fixture(scope="module")
def stub(vision_core: str) -> Iterator[Any]:
    with grpc.insecure_channel(vision_core) as channel:
        yield inference_service_pb2_grpc.InferenceServiceStub(channel)


def text(value: str) -> chat_pb2.ContentPart:
    return chat_pb2.ContentPart(text=value)


def image(data: bytes) -> chat_pb2.ContentPart:
    return chat_pb2.ContentPart(image=chat_pb2.ImageContent(data=data, mime_type="image/png"))


def user(*parts: chat_pb2.ContentPart) -> chat_pb2.Message:
    return chat_pb2.Message(role=chat_pb2.ROLE_USER, content=parts)


def request(
    model: str, *messages: chat_pb2.Message, tokens: int = TOKENS, **fields: Any
) -> chat_pb2.ChatRequest:
    return chat_pb2.ChatRequest(
        model=model,
        messages=messages,
        sampling=sampling_pb2.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True),
        include_token_ids=True,
        **fields,
    )


def answer(stub: Any, *arguments: Any, **fields: Any) -> Any:
    return stub.Chat(request(*arguments, **fields), timeout=SECONDS)


def tokens_of(response: Any) -> list[int]:
    return list(response.choices[0].token_ids)


def mlx_vlm_tokens(folder: Path, prompt: str, pictures: list[Any], count: int) -> list[int]:
    """What mlx-vlm's own generator says to the same prompt, greedily."""
    from mlx_vlm.generate import generate_step
    from mlx_vlm.utils import load_model

    model = load_model(folder)
    processor = FAMILIES[model.config.model_type].processor_class().from_pretrained(str(folder))
    if getattr(processor, "patch_size", "") is None:  # LLaVA's
        processor.patch_size, processor.vision_feature_select_strategy = 8, "default"
    inputs = dict(processor(text=[prompt], images=pictures))
    ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values")
    mask = inputs.pop("attention_mask")
    said = generate_step(ids, model, pixels, mask, max_tokens=count, temperature=0.0, **inputs)
    return [int(token) for token, _ in islice(said, count)]


@pytest.mark.parametrize("model", ALL_MODELS)
def test_answers_are_those_of_mlx_vlm(stub: Any, vision_dir: Path, model: str) -> None:
    first, second = picture(1), picture(2, 40, 80)
    response = answer(
        stub,
        model,
        user(image(encoded(first)), text("Compare with "), image(encoded(second)), text(" this.")),
    )
    mark = placeholder(model)
    if model == LLAVA:  # whose template puts images before all texts
        prompt = f"USER: {mark}\n{mark}\nCompare with   this. ASSISTANT:"
    elif mark == "<image>":
        prompt = f"<|im_start|>User:{mark}Compare with {mark} this.<end_of_utterance>\nAssistant:"
    else:
        prompt = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"{mark}Compare with {mark} this.<|im_end|>\n<|im_start|>assistant\n"
        )
    assert response.choices[0].finish_reason == sampling_pb2.FINISH_REASON_LENGTH
    assert len(tokens_of(response)) == TOKENS
    assert tokens_of(response) == mlx_vlm_tokens(vision_dir / model, prompt, [first, second], TOKENS)


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_with_and_without_images_answers_as_each_alone(stub: Any, model: str) -> None:
    conversations = [
        user(text("Say something about colours.")),
        user(image(png(3)), text("What is this?")),
        user(text("And "), image(png(4, 80, 40)), text("what is that? Be brief, and do not guess.")),
        user(text("No picture here; tell of the sea.")),
        user(image(png(5, 24, 24))),
    ]
    alone = [tokens_of(answer(stub, model, message, tokens=24)) for message in conversations]
    with ThreadPoolExecutor(len(conversations)) as pool:
        together = list(pool.map(lambda m: tokens_of(answer(stub, model, m, tokens=24)), conversations))

    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) == len(conversations)


@pytest.mark.parametrize("model", MODELS)
def test_the_next_turn_reuses_the_image_and_another_image_does_not(stub: Any, model: str) -> None:
    question = "Describe what is to be seen here, in some detail and without haste."

    def conversation(seed: int) -> list[chat_pb2.Message]:
        return [user(image(png(seed, 96, 96)), text(question))]

    first = answer(stub, model, *conversation(10))
    said = first.choices[0].message
    following = [*conversation(10), said, user(text("And now?"))]
    second = answer(stub, model, *following)
    other = answer(stub, model, *conversation(11))

    image_begins = 8 if model == SMOLVLM else 16
    assert second.usage.cached_prompt_tokens >= first.usage.prompt_tokens // 16 * 16
    assert other.usage.cached_prompt_tokens <= image_begins
    assert tokens_of(other) != tokens_of(first)
    # What was reused is what would have been computed: a conversation of other words before the image
    # shares nothing, and the whole of it again shares all.
    again = answer(stub, model, *following)
    assert tokens_of(again) == tokens_of(second)


def test_reuse_does_not_change_an_answer(vision_dir: Path, stub: Any) -> None:
    from tests.harness.processes import NO_LIMITS, core_process

    def conversation(model: str) -> list[chat_pb2.Message]:
        return [
            user(image(png(20, 96, 64)), text("What is the first picture of?")),
            chat_pb2.Message(role=chat_pb2.ROLE_ASSISTANT, content=[text("A house.")]),
            user(image(png(21, 64, 96)), text("And the second?")),
        ]

    flags = (*NO_LIMITS, "--max-loaded-models", "3", "--prompt-cache-bytes", "0")
    with core_process(vision_dir, *flags) as bare, grpc.insecure_channel(bare.address) as channel:
        fresh = inference_service_pb2_grpc.InferenceServiceStub(channel)
        for model in MODELS:
            messages = conversation(model)
            answer(stub, model, messages[0])
            reused, computed = answer(stub, model, *messages), answer(fresh, model, *messages)
            assert reused.usage.cached_prompt_tokens > 0
            assert computed.usage.cached_prompt_tokens == 0
            assert reused.usage.prompt_tokens == computed.usage.prompt_tokens
            assert tokens_of(reused) == tokens_of(computed)


def test_tokens_of_images_are_counted(stub: Any) -> None:
    chat = request(QWEN2_VL, user(image(png(30, 64, 48)), text("What?")))
    counted = stub.CountTokens(inference_service_pb2.CountTokensRequest(chat=chat), timeout=SECONDS)
    answered = stub.Chat(chat, timeout=SECONDS)
    bare = stub.Chat(request(QWEN2_VL, user(text("What?"))), timeout=SECONDS)

    assert counted.token_count == answered.usage.prompt_tokens
    # Twelve pieces of 16 x 16 pixels and the marks before and behind them.
    assert answered.usage.prompt_tokens == bare.usage.prompt_tokens + 12 + 2


def test_images_that_fill_the_context_are_refused(stub: Any) -> None:
    chat = request(SMOLVLM, *(user(image(png(seed))) for seed in range(60)))
    with pytest.raises(grpc.RpcError) as refused:
        stub.Chat(chat, timeout=SECONDS)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "context holds 2048" in refused.value.details()


def bomb() -> bytes:
    """A PNG whose header promises more pixels than are taken."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = int(MAX_PIXELS**0.5) + 1
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no PNG, JPEG, WebP or GIF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no PNG, JPEG, WebP or GIF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "no PNG, JPEG, WebP or GIF"),
        (b"BM" + bytes(200), "no PNG, JPEG, WebP or GIF"),
        (png()[:120], "damaged"),
        (bomb(), f"more than {MAX_PIXELS} pixels"),
        (png(0, 2000, 1), "cannot take an image of 2000 x 1 pixels"),
    ],
    ids=["empty", "svg", "postscript", "bmp", "cut", "bomb", "strip"],
)
def test_images_that_cannot_be_read_are_named(stub: Any, data: bytes, reason: str) -> None:
    chat = request(QWEN2_VL, user(text("Look: "), image(png()), image(data)))
    with pytest.raises(grpc.RpcError) as refused:
        stub.Chat(chat, timeout=SECONDS)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason in refused.value.details()
    assert (
        b"messages[0].content[2].image" in dict(refused.value.trailing_metadata())["grpc-status-details-bin"]
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True}), ("GIF", {}), ("PNG", {"bits": 8})],
)
def test_the_usual_formats_are_read(stub: Any, kind: str, options: dict[str, Any]) -> None:
    data = encoded(picture(40), kind, **options)
    assert len(tokens_of(answer(stub, QWEN2_VL, user(image(data), text("?"))))) == TOKENS


def test_a_photograph_is_turned_upright(stub: Any) -> None:
    from PIL import Image

    upright = picture(41, 64, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)

    def said(data: bytes) -> list[int]:
        return tokens_of(answer(stub, QWEN2_VL, user(image(data), text("What?"))))

    assert said(turned) == said(encoded(upright))


def test_the_first_frame_of_an_animation_counts(stub: Any) -> None:
    first, second = picture(42).quantize(64), picture(43).quantize(64)
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=[second], duration=100)
    animated = answer(stub, QWEN2_VL, user(image(file.getvalue()), text("What?")))
    still = answer(stub, QWEN2_VL, user(image(encoded(first, "GIF")), text("What?")))
    assert tokens_of(animated) == tokens_of(still)


@pytest.mark.parametrize("model", MODELS)
def test_a_placeholder_in_a_text_is_text(stub: Any, model: str) -> None:
    mark = "<image>" if model == SMOLVLM else "<|image_pad|>"
    plain = answer(stub, model, user(text(f"What does {mark} mean?")))
    shown = answer(stub, model, user(text(f"What does {mark} mean "), image(png(44)), text("here?")))
    assert len(tokens_of(plain)) == len(tokens_of(shown)) == TOKENS


def test_an_image_in_a_result_is_shown(stub: Any) -> None:
    call = chat_pb2.ToolCall(id="c1", function=chat_pb2.FunctionCall(name="look", arguments_json="{}"))
    conversation = [
        user(text("Look outside.")),
        chat_pb2.Message(role=chat_pb2.ROLE_ASSISTANT, tool_calls=[call]),
        chat_pb2.Message(
            role=chat_pb2.ROLE_TOOL, tool_call_id="c1", content=[text("This: "), image(png(45))]
        ),
    ]
    with_image = answer(stub, QWEN2_VL, *conversation)
    del conversation[-1].content[1:]
    without = answer(stub, QWEN2_VL, *conversation)
    assert with_image.usage.prompt_tokens > without.usage.prompt_tokens + 12


def test_an_assistant_shows_no_images(stub: Any) -> None:
    said = chat_pb2.Message(role=chat_pb2.ROLE_ASSISTANT, content=[image(png())])
    with pytest.raises(grpc.RpcError, match=r"is for user and tool messages only"):
        answer(stub, QWEN2_VL, user(text("Hello")), said, user(text("?")))


def test_a_session_remembers_images(stub: Any) -> None:
    first = answer(stub, QWEN2_VL, user(image(png(46)), text("What?")), session_id="s")
    second = answer(stub, QWEN2_VL, user(text("And then?")), session_id="s")
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert second.usage.cached_prompt_tokens >= first.usage.prompt_tokens // 16 * 16


def test_penalties_and_several_choices_go_with_images(stub: Any) -> None:
    chat = request(QWEN2_VL, user(image(png(47)), text("What?")), choice_count=3)
    chat.sampling.temperature = 1.0
    chat.sampling.seed = 7
    chat.sampling.repetition_penalty = 1.3
    chat.sampling.repetition_context = -1
    chat.sampling.top_logprobs = 2
    first, second = stub.Chat(chat, timeout=SECONDS), stub.Chat(chat, timeout=SECONDS)
    assert [c.token_ids for c in first.choices] == [c.token_ids for c in second.choices]
    assert len(first.choices) == 3


def test_models_that_take_images_say_so(stub: Any) -> None:
    listed = stub.ListModels(inference_service_pb2.ListModelsRequest(), timeout=SECONDS).models
    assert {model.id for model in listed} == set(ALL_MODELS)
    assert all(model_pb2.CAPABILITY_VISION in model.capabilities for model in listed)


def test_a_model_of_texts_refuses_images(tiny_core: str) -> None:
    with grpc.insecure_channel(tiny_core) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        for call in (
            lambda chat: stub.Chat(chat, timeout=SECONDS),
            lambda chat: stub.CountTokens(
                inference_service_pb2.CountTokensRequest(chat=chat), timeout=SECONDS
            ),
        ):
            with pytest.raises(grpc.RpcError, match="does not take images") as refused:
                call(request("tiny-llama", user(text("Look"), image(png()))))
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.asyncio(loop_scope="session")
async def test_without_mlx_vlm_clients_are_told_what_to_install(
    vision_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "is_installed", lambda: False)
    async with running_core(vision_dir) as core, inference_stub(core.address) as inference:
        listed = (await inference.ListModels(inference_service_pb2.ListModelsRequest())).models
        assert not any(model_pb2.CAPABILITY_VISION in model.capabilities for model in listed)

        # mlx-lm knows Qwen2-VL's language part, and no SmolVLM.
        with pytest.raises(grpc.aio.AioRpcError, match=r"pip install 'osaurus\[vision\]'") as refused:
            await inference.Chat(request(QWEN2_VL, user(image(png()))))
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert len(tokens_of(await inference.Chat(request(QWEN2_VL, user(text("Hello")))))) == TOKENS
        with pytest.raises(grpc.aio.AioRpcError, match=r"pip install 'osaurus\[vision\]'"):
            await inference.Chat(request(SMOLVLM, user(text("Hello"))))


@pytest.mark.asyncio(loop_scope="session")
async def test_another_mlx_vlm_is_named(vision_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: families.Family) -> Any:
        raise ImportError("no such name")

    monkeypatch.setattr(families.Family, "processor_class", missing)
    async with running_core(vision_dir) as core, inference_stub(core.address) as inference:
        with pytest.raises(grpc.aio.AioRpcError, match="another one than is needed: pip install"):
            await inference.Chat(request(QWEN2_VL, user(text("Hello"))))


@pytest.mark.asyncio(loop_scope="session")
async def test_code_that_comes_with_a_model_is_never_run(vision_dir: Path, tmp_path: Path) -> None:
    models, trace = tmp_path / "models", tmp_path / "ran"
    folder = models / QWEN2_VL
    shutil.copytree(vision_dir / QWEN2_VL, folder)
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own.Config", "AutoProcessor": "own.Processor", "AutoModel": "own.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "own.py", "auto_map": code}))
    async with running_core(models) as core, inference_stub(core.address) as inference:
        with pytest.raises(grpc.aio.AioRpcError, match="code of its own, which is never run"):
            await inference.Chat(request(QWEN2_VL, user(image(png()))))
    assert not trace.exists()


@pytest.mark.asyncio(loop_scope="session")
async def test_an_image_is_found_on_the_disk_after_a_restart(vision_dir: Path, tmp_path: Path) -> None:
    # Runs of blocks are written: the prompt must fill some.
    talk = [user(image(png(60, 96, 96)), text("Tell me all about this picture. " * 40))]
    answers = []
    for _ in range(2):
        async with (
            running_core(vision_dir, prompt_cache_dir=tmp_path) as core,
            inference_stub(core.address) as inference,
        ):
            answers.append(await inference.Chat(request(QWEN2_VL, *talk)))
    assert answers[0].usage.cached_prompt_tokens == 0
    assert answers[1].usage.cached_prompt_tokens >= 256
    assert tokens_of(answers[0]) == tokens_of(answers[1])
