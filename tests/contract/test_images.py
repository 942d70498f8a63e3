"""Images through the official clients, against the real core and tiny models that take them."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

from tests.conftest import TINY
from tests.harness.pictures import data_url, png
from tests.harness.processes import rest_process
from tests.harness.tiny_vision import QWEN2_VL, SMOLVLM

RED, BLUE = png(1), png(2)
TOKENS = 10


@pytest.fixture(scope="module")
def pictures() -> Iterator[str]:
    """Base URL of a server of this machine with two pictures."""

    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = {"/red": RED, "/blue": BLUE}.get(self.path)
            self.send_response(200 if data else 404)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def fetching_http(vision_core: str) -> Iterator[str]:
    """Base URL of a shim that fetches images from this machine."""
    flags = ("--allow-image-urls", "--image-url-network", "127.0.0.1/32")
    with rest_process(vision_core, *flags) as process:
        yield process.url


def part(url: str) -> Any:
    return {"type": "image_url", "image_url": {"url": url}}


def openai_answer(base: str, model: str, *urls: str, **fields: Any) -> Any:
    content: Any = [{"type": "text", "text": "What is this?"}, *map(part, urls)]
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            max_tokens=TOKENS,
            temperature=0,
            **fields,
        )
        return list(answer) if fields.get("stream") else answer


@pytest.mark.parametrize("model", [SMOLVLM, QWEN2_VL])
def test_openai(vision_http: str, model: str) -> None:
    red, blue, both = (
        openai_answer(vision_http, model, *urls)
        for urls in ([data_url(RED)], [data_url(BLUE)], [data_url(RED), data_url(BLUE)])
    )
    assert red.choices[0].message.content != blue.choices[0].message.content
    assert both.usage.prompt_tokens > red.usage.prompt_tokens == blue.usage.prompt_tokens

    stream = openai_answer(vision_http, model, data_url(RED), stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == red.choices[0].message.content


def test_openai_by_url(fetching_http: str, pictures: str) -> None:
    fetched = openai_answer(fetching_http, QWEN2_VL, f"{pictures}/red")
    sent = openai_answer(fetching_http, QWEN2_VL, data_url(RED))
    assert fetched.choices[0].message.content == sent.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="status 404") as refused:
        openai_answer(fetching_http, QWEN2_VL, f"{pictures}/none")
    assert refused.value.param == "messages[0].content[1].image_url.url"


@pytest.mark.parametrize(
    ("model", "url", "param"),
    [
        (QWEN2_VL, "http://127.0.0.1:9/x.png", "messages[0].content[1].image_url.url"),
        (QWEN2_VL, data_url(b"no image"), "messages[0].content[1].image_url"),
        (QWEN2_VL, data_url(RED[:100]), "messages[0].content[1].image_url"),
    ],
)
def test_openai_refuses_by_the_parts_place(vision_http: str, model: str, url: str, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        openai_answer(vision_http, model, url)
    assert refused.value.param == param


def test_a_model_of_texts_refuses_by_the_parts_place(tiny_http: str) -> None:
    with pytest.raises(openai.BadRequestError, match="does not take images") as refused:
        openai_answer(tiny_http, TINY, data_url(RED))
    assert refused.value.param == "messages[0].content[1].image_url"


def test_openai_responses(fetching_http: str, pictures: str) -> None:
    with openai.OpenAI(base_url=f"{fetching_http}/v1", api_key="none", max_retries=0) as client:

        def answer(url: str) -> Any:
            image: Any = {"type": "input_image", "image_url": url, "detail": "auto"}
            content: Any = [{"type": "input_text", "text": "What is this?"}, image]
            return client.responses.create(
                model=QWEN2_VL,
                input=[{"role": "user", "content": content}],
                max_output_tokens=TOKENS,
                temperature=0,
            )

        fetched, sent = answer(f"{pictures}/red"), answer(data_url(RED))
        assert fetched.output_text == sent.output_text
        # What is kept of a response is its image, and not where it was.
        following = client.responses.create(
            model=QWEN2_VL,
            input="And now?",
            previous_response_id=fetched.id,
            max_output_tokens=TOKENS,
            temperature=0,
        )
        assert following.usage is not None
        assert following.usage.input_tokens > fetched.usage.input_tokens
        assert following.usage.input_tokens_details.cached_tokens > 0


def test_anthropic(fetching_http: str, pictures: str) -> None:
    encoded = base64.b64encode(RED).decode()
    sources: list[Any] = [
        {"type": "base64", "media_type": "image/png", "data": encoded},
        {"type": "url", "url": f"{pictures}/red"},
    ]
    with anthropic.Anthropic(base_url=fetching_http, api_key="none", max_retries=0) as client:
        answers = []
        for source in sources:
            messages: Any = [
                {
                    "role": "user",
                    "content": [{"type": "image", "source": source}, {"type": "text", "text": "What?"}],
                }
            ]
            answers.append(
                client.messages.create(
                    model=QWEN2_VL, max_tokens=TOKENS, messages=messages, extra_body={"temperature": 0}
                )
            )
            counted = client.messages.count_tokens(model=QWEN2_VL, messages=messages)
            cached = answers[-1].usage.cache_read_input_tokens or 0
            assert counted.input_tokens == answers[-1].usage.input_tokens + cached
    assert answers[0].content == answers[1].content


def test_anthropic_and_ollama_refuse_by_the_images_place(vision_http: str) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(RED[:90]).decode()}
    content: Any = [{"type": "text", "text": "What?"}, {"type": "image", "source": source}]
    with (
        anthropic.Anthropic(base_url=vision_http, api_key="none", max_retries=0) as client,
        pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content\.1: .*damaged"),
    ):
        client.messages.create(model=QWEN2_VL, max_tokens=1, messages=[{"role": "user", "content": content}])
    message = {"role": "user", "content": "What?", "images": [RED, RED[:90]]}
    with (
        ollama.Client(host=vision_http) as other,
        pytest.raises(ollama.ResponseError, match="damaged") as refused,
    ):
        other.chat(QWEN2_VL, [message])
    assert refused.value.status_code == 400


def test_anthropic_results_with_an_image(vision_http: str) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(BLUE).decode()}
    messages: Any = [
        {"role": "user", "content": "Look outside."},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {}}]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "image", "source": source}]}
            ],
        },
    ]
    with anthropic.Anthropic(base_url=vision_http, api_key="none", max_retries=0) as client:
        tools: Any = [{"name": "look", "input_schema": {"type": "object", "properties": {}}}]
        answer = client.messages.create(model=QWEN2_VL, max_tokens=TOKENS, messages=messages, tools=tools)
    assert answer.usage.output_tokens == TOKENS


def test_ollama(vision_http: str) -> None:
    with ollama.Client(host=vision_http) as client:
        options = {"temperature": 0, "num_predict": TOKENS}
        said = [
            client.chat(
                QWEN2_VL, [{"role": "user", "content": "What is this?", "images": [image]}], options=options
            )
            for image in (RED, BLUE, RED)
        ]
        assert said[0].message.content == said[2].message.content != said[1].message.content
        generated = client.generate(QWEN2_VL, "What is this?", images=[RED], options=options)
        assert generated.response == said[0].message.content
        assert "vision" in (client.show(QWEN2_VL).capabilities or [])
    tags = httpx.get(f"{vision_http}/api/tags").json()["models"]
    assert all("vision" in model["capabilities"] for model in tags)
