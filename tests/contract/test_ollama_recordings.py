"""Every recorded exchange of Ollama's own server, asked of ours on the tiny model.

What is compared: status, content type, the keys and their order, the types of all values, the texts of
errors, and the values that tell clients what happened. Where ours answers otherwise, DEVIATIONS says how
and why. The recordings hold what was sent and what came back; bodies longer than 1,500 characters are
cut off. OpenAI's routes are not among them: there, OpenAI's own server is the measure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.conftest import TINY

RECORDINGS = Path(__file__).parent / "recordings" / "ollama.txt"
# Compared as they are; of all other values, only the types are.
TELLING_KEYS = {"model", "role", "done", "error", "type"}
FORCED_ENDS = {"load", "unload", "length"}
BY_THE_CONTRACT = "our HTTP contract decides so"
NOT_HERE = "belongs to a later release"


@dataclass(frozen=True)
class Recording:
    """One exchange."""

    name: str
    method: str
    path: str
    request: str
    status: int
    content_type: str
    body: str


@dataclass(frozen=True)
class Deviation:
    """Where ours answers otherwise.

    Attributes:
        reason: Why.
        status: Ours.
        text: The error's text, a regular expression.
        like: The recording whose shape ours has.
        add: What is added to the request.
        content_type: Ours.
        body: The whole body.
    """

    reason: str
    status: int | None = None
    text: str | None = None
    like: str = ""
    add: Mapping[str, object] = field(default_factory=dict)
    content_type: str | None = None
    body: str | None = None


def recordings() -> Iterator[Recording]:
    for block in re.split(r"(?m)^### ", RECORDINGS.read_text(encoding="utf-8"))[1:]:
        name, first, *lines = block.rstrip("\n").split("\n")
        method, path = first.split(" ")
        sent = [line[2:] for line in lines if line.startswith("> ")]
        heads = [line[2:] for line in lines if line.startswith("< ")]
        body = "\n".join(line for line in lines if not line.startswith(("> ", "< ", ">")))
        headers = dict(head.split(": ", 1) for head in heads[1:])
        yield Recording(
            name, method, path, "\n".join(sent), int(heads[0].split(" ")[0]),
            headers.get("Content-Type", ""), "" if body == "''" else body,
        )  # fmt: skip


RECORDED = {recording.name: recording for recording in recordings()}

_STREAMED = Deviation("our /chat streams only where it is asked to", add={"stream": True})
_WRONG_OPTION = Deviation(f"{BY_THE_CONTRACT}: a wrong field is 400", status=400)
_OWN_WORDS = "what a Go decoder says of Go types means nothing here; the same place is named"
_LATER = Deviation(NOT_HERE, status=501, text=".* is not implemented in this release.")
_JSON, _JSON_UTF8 = "application/json", "application/json; charset=utf-8"
_VECTORS = Deviation(
    "here, chat models give vectors too",
    status=200,
    content_type=_JSON_UTF8,
    body=r'\{"model":"tiny-llama","embeddings":\[\[.*\]\],"total_duration":\d+,"load_duration":\d+,'
    r'"prompt_eval_count":\d+\}',
)

DEVIATIONS: Mapping[str, Deviation] = {
    "root": Deviation(BY_THE_CONTRACT, body="Osaurus is running"),
    "unknown path": Deviation(BY_THE_CONTRACT, content_type=_JSON, body=".*not_found.*"),
    "wrong method": Deviation(
        BY_THE_CONTRACT, content_type=_JSON_UTF8, text="GET is not allowed on this path."
    ),
    "wrong method 2": Deviation(
        BY_THE_CONTRACT, content_type=_JSON_UTF8, text="POST is not allowed on this path."
    ),
    "chat stream default": _STREAMED,
    "chat stream:null": _STREAMED,
    "chat logprobs stream": _STREAMED,
    "chat format bad": _WRONG_OPTION,
    "chat format json": Deviation(
        "the tiny model's likeliest object is an empty one, and no limit cuts that off",
        body=r'\{"model":"tiny-llama","created_at":"[^"]+","message":\{"role":"assistant",'
        r'"content":"\{\}"\},"done":true,"done_reason":"stop","total_duration":\d+,"load_duration":\d+,'
        r'"prompt_eval_count":\d+,"prompt_eval_duration":\d+,"eval_count":\d+,"eval_duration":\d+\}',
    ),
    "chat option wrong type": _WRONG_OPTION,
    "chat option wrong type int": _WRONG_OPTION,
    "chat stop as string": _WRONG_OPTION,
    "chat tools unsupported": Deviation(
        "tools work with every chat model", status=200, like="chat stream:false"
    ),
    "chat image unsupported": Deviation("the recorded text is of another server behind it", text=".*mage.*"),
    "chat image not base64": Deviation(_OWN_WORDS, text=r"messages\[0\]\.images\[0\]: illegal base64 data"),
    "chat bad json": Deviation(_OWN_WORDS, text="The request body is not valid JSON: .*line 1 column 2.*"),
    "chat messages wrong type": Deviation(_OWN_WORDS, text="Invalid 'messages': .*"),
    "chat content wrong type": Deviation(_OWN_WORDS, text=r"Invalid 'messages\[0\]\.content': .*"),
    "chat num_predict 0": Deviation(
        "the context is cut for time, so the answer has no other end",
        add={"options": {"num_predict": 0, "num_ctx": 48, "temperature": 0}},
        like="chat stream:false",
    ),
    "generate suffix": Deviation(
        "our names have no registry before them", text=f"{TINY} does not support insert"
    ),
    "embed string": _VECTORS,
    "embed list": _VECTORS,
    **dict.fromkeys(
        ("create from", "create stream false", "create nothing", "create no model", "blob bad digest",
         "blob mismatch", "pull offline", "pull offline nostream", "pull no model", "push no model", "push"),
        _LATER,
    ),
    "blob head bad": Deviation(NOT_HERE, status=501),
    "show mario": Deviation("nothing is created", status=404, text="model 'mario:latest' not found"),
    "v1 messages no max_tokens": Deviation(
        BY_THE_CONTRACT, content_type=_JSON, text="max_tokens: Field required"
    ),
    "v1 messages unknown model": Deviation(BY_THE_CONTRACT, text="Model not found: nope"),
    "count_tokens": Deviation(
        "Ollama has none", status=200, content_type=_JSON, body=r'\{"input_tokens":\d+\}'
    ),
}  # fmt: skip

# The two of Anthropic's API whose usage says more than Ollama's are compared by Anthropic's SDK.
_BY_SDK = {"v1 messages", "v1 messages stream"}


def here(text: str) -> str:
    """A recorded text with the tiny model's name."""
    text = text.replace("registry.ollama.ai/library/smollm2:latest", TINY).replace("smollm2:latest", TINY)
    return text.replace("SmolLM2:LATEST", f"{TINY.upper()}:latest").replace("smollm2", TINY)


def shape(value: object, key: str = "") -> object:
    """What clients rely on: keys in order and types; values of those that tell what happened."""
    if isinstance(value, dict):
        return [(name, shape(item, name)) for name, item in value.items()]
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    if key in TELLING_KEYS or (key == "done_reason" and value in FORCED_ENDS):
        return value
    # Whether a number has a fraction is chance; whether a duration has one is not.
    return "number" if key == "logprob" else type(value).__name__


def lines_of(body: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in body.splitlines() if line]


@pytest.fixture(scope="module")
def http(tiny_http: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_http, timeout=120) as made:
        yield made


def ask(http: httpx.Client, recording: Recording, add: Mapping[str, object]) -> httpx.Response:
    content = here(recording.request)
    if add:
        content = json.dumps({**json.loads(content), **add})
    # As curl sends it.
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    return http.request(recording.method, recording.path, content=content or None, headers=headers)


def prepare(http: httpx.Client, name: str) -> None:
    """Bring the server where it was when the exchange was recorded."""
    steps = {
        "ps (idle or loaded)": {}, "ps loaded": {}, "ps after 10m": {"keep_alive": "10m"},
        "ps after -1": {"keep_alive": -1}, "ps after unload": {"keep_alive": 0},
    }  # fmt: skip
    if name in steps:
        http.post("/api/chat", json={"model": TINY, **steps[name]}).raise_for_status()
    if name == "delete":
        body = {"source": TINY, "destination": "llama3.2:1b"}
        http.post("/api/copy", json=body)


@pytest.mark.parametrize("name", [name for name in RECORDED if name not in _BY_SDK])
def test_as_recorded(http: httpx.Client, name: str) -> None:
    recording = RECORDED[name]
    deviation = DEVIATIONS.get(name, Deviation(""))
    prepare(http, name)
    answer = ask(http, recording, deviation.add)
    like = RECORDED[deviation.like] if deviation.like else recording
    assert answer.status_code == (deviation.status or like.status), answer.text
    if deviation.status is None or deviation.content_type is not None:
        wanted = like.content_type if deviation.content_type is None else deviation.content_type
        if like.body or wanted:
            assert answer.headers.get("Content-Type") == wanted
    if deviation.body is not None:
        assert re.fullmatch(deviation.body, answer.text)
    elif deviation.text is not None:
        error = answer.json()["error"]
        text = error["message"] if isinstance(error, dict) else error
        assert re.fullmatch(deviation.text, text), text
    elif recording.method == "HEAD":
        assert answer.content == b""
    elif name in ("show", "show legacy name"):
        compare_cut_off(recording.body, answer.json())
    else:
        compare(here(like.body), answer.text)


def compare(recorded: str, ours: str) -> None:
    """Bodies of one object, or of one a line."""
    wanted, made = lines_of(recorded), lines_of(ours)
    assert bool(wanted) == bool(made)
    if not wanted:
        return
    assert shape(made[-1]) == shape(wanted[-1])
    for line in made[:-1]:
        assert shape(line) == shape(wanted[0])
    assert bool(made[1:]) == bool(wanted[1:])


def compare_cut_off(recorded: str, ours: dict[str, object]) -> None:
    """A body that was cut off in its middle, against the keys that can still be read."""
    wanted = re.findall(r'"(license|modelfile|parameters|template|details|model_info)":', recorded)
    # Nothing is known of licenses.
    assert list(ours)[: len(wanted) - 1] == [key for key in wanted if key != "license"]
    details = re.search(r'"details":(\{.*?\})', recorded)
    assert details is not None
    assert shape(ours["details"]) == shape(json.loads(details[1]))
    info = ours["model_info"]
    assert isinstance(info, dict)
    for key in ("general.architecture", "general.parameter_count", "llama.context_length"):
        assert type(info[key]) is (str if key.endswith("architecture") else int)
        assert f'"{key}":' in recorded


def test_chat_answers_whole_unless_asked(http: httpx.Client) -> None:
    for name in ("chat stream default", "chat stream:null"):
        answer = ask(http, RECORDED[name], {})
        assert answer.headers["Content-Type"] == RECORDED["chat stream:false"].content_type
        compare(here(RECORDED["chat stream:false"].body), answer.text)


def test_every_deviation_is_of_a_recording() -> None:
    assert set(DEVIATIONS) <= set(RECORDED)
