"""Response formats on a real engine: a random model cannot but keep to them."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import AutoTokenizer

from osaurus_grpc.v1 import chat_pb2, completion_pb2, sampling_pb2
from tests.harness.schemas import SCHEMAS
from tests.server.cores import TINY, chat_request, failure, stream_request, text_of
from tests.server.test_errors import INVALID, require_reason

pytestmark = pytest.mark.asyncio(loop_scope="session")

STOP = sampling_pb2.FINISH_REASON_STOP
LENGTH = sampling_pb2.FINISH_REASON_LENGTH
SCHEMA_FIELD = "response_format.json_schema.schema_json"
# Of the forty, some of each kind; tests/chat follows them all.
NAMES = [
    "flat",
    "any of types",
    "array of records",
    "eighteen digits",
    "unicode keys",
    "date-time",
    "uuid",
    "bare",
]


def schema_format(schema: Any, *, strict: bool = True) -> chat_pb2.ResponseFormat:
    made = chat_pb2.JsonSchemaFormat(name="n", schema_json=json.dumps(schema), strict=strict)
    return chat_pb2.ResponseFormat(json_schema=made)


def asked(form: chat_pb2.ResponseFormat | None, text: str = "Hello", **settings: Any) -> chat_pb2.ChatRequest:
    request = chat_request(text, **{"max_tokens": 300, **settings})
    if form is not None:
        request.response_format.CopyFrom(form)
    return request


async def streamed(inference: Any, request: chat_pb2.ChatRequest) -> tuple[str, int]:
    text, reason = "", 0
    async for event in inference.ChatStream(stream_request(request)):
        text += event.content.text
        reason = event.choice_finished.finish_reason or reason
    return text, reason


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_answers_satisfy_their_schemas_alone_and_together(inference: Any, temperature: float) -> None:
    requests = [
        asked(schema_format(SCHEMAS[name]), f"Say {name}", temperature=temperature, seed=i)
        for i, name in enumerate(NAMES)
    ]
    free = asked(None, "Talk", temperature=temperature, seed=9, max_tokens=24)
    alone = [await inference.Chat(request) for request in requests]
    free_alone = await inference.Chat(free)
    together = await asyncio.gather(*(streamed(inference, request) for request in [*requests, free]))
    for name, one, (text, reason) in zip(NAMES, alone, together, strict=False):
        assert text == text_of(one)
        assert reason == one.choices[0].finish_reason == STOP
        jsonschema.validate(json.loads(text), SCHEMAS[name])
    assert together[-1] == (text_of(free_alone), LENGTH)


async def test_a_json_object(inference: Any) -> None:
    form = chat_pb2.ResponseFormat(json_object=chat_pb2.JsonObjectFormat())
    response = await inference.Chat(asked(form, max_tokens=200, temperature=1.0, seed=5))
    (choice,) = response.choices
    assert text_of(response).startswith("{")
    assert choice.finish_reason in (STOP, LENGTH)
    if choice.finish_reason == STOP:
        assert isinstance(json.loads(text_of(response)), dict)


async def test_an_expression_and_a_grammar(inference: Any) -> None:
    regex = chat_pb2.ResponseFormat(regex="(yes|no), [0-9]{2}%")
    for seed in range(3):
        text = text_of(await inference.Chat(asked(regex, temperature=1.0, seed=seed)))
        assert re.fullmatch("(yes|no), [0-9]{2}%", text)
    grammar = chat_pb2.ResponseFormat(grammar='start: "<" WORD ("," WORD){1,3} ">"\nWORD: /[a-z]{1,4}/')
    text = text_of(await inference.Chat(asked(grammar, temperature=1.0, seed=1)))
    assert re.fullmatch("<[a-z]{1,4}(,[a-z]{1,4}){1,3}>", text)


async def test_completions_have_forms_too(inference: Any) -> None:
    request = completion_pb2.CompleteRequest(model=TINY, text="Once")
    request.sampling.max_tokens = 100
    request.response_format.CopyFrom(schema_format(SCHEMAS["flat"]))
    response = await inference.Complete(request)
    jsonschema.validate(json.loads(response.choices[0].text), SCHEMAS["flat"])


async def test_several_choices_each_keep_to_it(inference: Any) -> None:
    request = asked(schema_format(SCHEMAS["flat"]), temperature=1.5, seed=1)
    request.choice_count = 4
    response = await inference.Chat(request)
    texts = ["".join(part.text for part in choice.message.content) for choice in response.choices]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMAS["flat"])
    assert len(set(texts)) > 1


async def test_settings_of_sampling_count_within_the_form(inference: Any) -> None:
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 3, "maxItems": 3}
    request = asked(schema_format(schema), temperature=0.0, top_logprobs=3, presence_penalty=1.0)
    request.sampling.ignore_eos = True
    response = await inference.Chat(request)
    jsonschema.validate(json.loads(text_of(response)), schema)
    (choice,) = response.choices
    assert choice.finish_reason == STOP
    assert len(choice.logprobs.tokens) == response.usage.completion_tokens
    assert all(token.chosen.logprob > -1e4 and len(token.top) == 3 for token in choice.logprobs.tokens)


async def test_a_cut_answer_says_so(inference: Any) -> None:
    response = await inference.Chat(asked(schema_format(SCHEMAS["uuid"]), max_tokens=4))
    assert response.choices[0].finish_reason == LENGTH
    assert response.usage.completion_tokens == 4


async def test_a_stop_text_still_stops(inference: Any) -> None:
    request = asked(chat_pb2.ResponseFormat(regex="[ab]{3}END[ab]{20}"))
    request.sampling.stop.append("END")
    response = await inference.Chat(request)
    assert response.choices[0].finish_reason == sampling_pb2.FINISH_REASON_STOP_SEQUENCE
    assert re.fullmatch("[ab]{3}", text_of(response))


@pytest.mark.parametrize(
    ("form", "field", "words"),
    [
        (
            schema_format({"properties": {"a": {"contains": {}}}}),
            SCHEMA_FIELD,
            '"contains" at #/properties/a/contains',
        ),
        (
            schema_format({"items": {"uniqueItems": True}}, strict=False),
            SCHEMA_FIELD,
            '"uniqueItems" at #/items/uniqueItems',
        ),
        (
            schema_format({"items": {"type": "string", "pattern": "(?=a)"}}),
            SCHEMA_FIELD,
            '"pattern" at #/items/pattern',
        ),
        (chat_pb2.ResponseFormat(json_schema=chat_pb2.JsonSchemaFormat()), SCHEMA_FIELD, "not valid JSON"),
        (chat_pb2.ResponseFormat(regex="("), "response_format.regex", "cannot be enforced"),
        (chat_pb2.ResponseFormat(grammar="start: nothing"), "response_format.grammar", "cannot be enforced"),
    ],
)
async def test_what_cannot_be_enforced_is_named_before_any_token(
    inference: Any, form: chat_pb2.ResponseFormat, field: str, words: str
) -> None:
    for call in (inference.Chat(asked(form)), inference.ChatStream(stream_request(asked(form)))):
        error = await failure(call)
        require_reason(error, INVALID, "INVALID_FIELD")
        assert error.fields == [field]
        assert words in error.message


async def test_a_grammar_that_becomes_too_complex_ends_its_own_answer(inference: Any) -> None:
    # Letters of all scripts, counted in two ways at once: the automaton outgrows its bound.
    hostile = asked(chat_pb2.ResponseFormat(regex=r"(\p{L}{1,100}\w{1,100}){1,50}"), temperature=1.0, seed=2)
    good = asked(schema_format(SCHEMAS["nested"]), temperature=1.0, seed=3)
    expected = text_of(await inference.Chat(good))
    error, answer = await asyncio.gather(failure(inference.Chat(hostile)), inference.Chat(good))
    require_reason(error, INVALID, "INVALID_FIELD")
    assert error.fields == ["response_format.regex"]
    assert text_of(answer) == expected


async def test_an_answer_beside_tools_is_a_call_or_has_the_form(inference: Any, tiny_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir / TINY)
    openings = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).startswith("<")]
    schema = {"type": "object", "properties": {"answer": {"type": "integer", "maximum": 9, "minimum": 0}},
              "required": ["answer"]}  # fmt: skip
    parameters = {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]}
    kinds = set()
    for seed, bias in ((1, 0.0), (2, 0.0), (3, -100.0), (4, -100.0)):
        request = asked(
            schema_format(schema), temperature=1.0, seed=seed, logit_bias=dict.fromkeys(openings, bias)
        )
        request.tools.add(
            function=chat_pb2.FunctionTool(name="clock", parameters_json=json.dumps(parameters))
        )
        response = await inference.Chat(request)
        (choice,) = response.choices
        assert choice.finish_reason != LENGTH
        if choice.message.tool_calls:
            kinds.add("call")
            for call in choice.message.tool_calls:
                assert call.function.name == "clock"
                jsonschema.validate(json.loads(call.function.arguments_json), parameters)
        else:
            kinds.add("answer")
            jsonschema.validate(json.loads(text_of(response)), schema)
    assert kinds == {"call", "answer"}


async def test_a_forced_call_takes_no_form(inference: Any) -> None:
    request = asked(schema_format({"const": 1}), temperature=1.0, seed=1)
    request.tools.add(
        function=chat_pb2.FunctionTool(name="clock", parameters_json='{"type":"object","properties":{}}')
    )
    request.tool_choice.mode = chat_pb2.TOOL_CHOICE_MODE_REQUIRED
    response = await inference.Chat(request)
    assert response.choices[0].message.tool_calls[0].function.name == "clock"
