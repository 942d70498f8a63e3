from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from rest_shim.bodies import MAX_DEPTH, Body, Integer, json_path, parse_object, validate
from rest_shim.errors import Refusal


def refusal(data: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse_object(data)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_request"
    return caught.value


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "missing request body"),
        (b" \r\n\t", "missing request body"),
        (b"{", "not valid JSON"),
        (b"{bad", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": // comment\n1}', "not valid JSON"),
        (b'{"a": "\n"}', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": [Infinity]}', "Infinity is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "too large"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
        (b'{"\\uDC00": 1}', "lone surrogate"),
        (b'{"a": ["\\uDFFF\\ud800"]}', "lone surrogate"),
        (b'{"a": 1, "a": 2}', "duplicate key"),
        (b'{"a": {"b": 1, "b": 1}}', "duplicate key"),
        (b"{" + b",".join(b'"a":1' for _ in range(100_000)) + b"}", "duplicate key"),
        (b'{"a": [' + b"[]," * 300_000 + b"[]]}", "too many values"),
        (b'{"a": [' + b"1," * 1_100_000 + b"1]}", "too many values"),
        (b'{"a":' * 100_000, "nested"),
        (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "nested"),
        (b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested"),
    ],
)
def test_what_is_no_usable_json_object_is_refused(data: bytes, says: str) -> None:
    assert says in refusal(data).message


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"{}", {}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": "\\ud83e\\udd95"}', {"a": "\U0001f995"}),
        (b'{"z": 1, "a": {"z": 2, "a": 3}}', {"z": 1, "a": {"z": 2, "a": 3}}),
        (b'{"a": 12345678901234567890123}', {"a": 12345678901234567890123}),
        (b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}", None),
        (b'{"a": [' + b",".join([b"{}"] * 1000) + b"]}", {"a": [{}] * 1000}),
    ],
)
def test_what_is_a_json_object_is_taken(data: bytes, value: object) -> None:
    parsed = parse_object(data)
    assert value is None or parsed == value
    assert value is None or list(parsed) == list(value)  # type: ignore[call-overload]  # a dict


@given(st.binary(max_size=200))
def test_bytes_give_an_object_or_a_refusal(data: bytes) -> None:
    with contextlib.suppress(Refusal):
        assert isinstance(parse_object(data), dict)


_TEXT = st.text(st.characters(exclude_categories=("Cs",)))
_NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
_JSON = st.recursive(
    st.none() | st.booleans() | _NUMBERS | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(_TEXT, _JSON, max_size=4), st.booleans())
def test_every_json_object_is_parsed_as_it_is(value: dict[str, object], ascii_only: bool) -> None:
    assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


class Inner(Body):
    count: Integer
    rate: float = 1.0


class Outer(Body):
    items: list[Inner]
    flag: bool = False
    name: str = "default"


def outer(**fields: object) -> Outer:
    return validate(Outer, {"items": [], **fields})


def param(model: type[BaseModel], value: object) -> str | None:
    with pytest.raises(Refusal) as caught:
        validate(model, value)
    assert caught.value.status == 400
    assert caught.value.param is None or caught.value.param in caught.value.message
    return caught.value.param


def test_null_means_absent_and_unknown_keys_are_ignored() -> None:
    assert outer(name=None, flag=None, unknown={"x": 1}).name == "default"
    assert outer(items=[{"count": 1, "rate": None}]).items[0].rate == 1.0


def test_a_whole_float_is_an_integer_and_an_integer_a_float() -> None:
    inner = outer(items=[{"count": 2.0, "rate": 3}]).items[0]
    assert (inner.count, inner.rate) == (2, 3.0)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({}, "items"),
        ({"items": None}, "items"),
        ({"items": "x"}, "items"),
        ({"items": [1]}, "items[0]"),
        ({"items": [{"count": 1}, {}]}, "items[1].count"),
        ({"items": [{"count": True}]}, "items[0].count"),
        ({"items": [{"count": "1"}]}, "items[0].count"),
        ({"items": [{"count": 1.5}]}, "items[0].count"),
        ({"items": [{"count": 1, "rate": True}]}, "items[0].rate"),
        ({"items": [{"count": 1, "rate": "1"}]}, "items[0].rate"),
        ({"items": [{"count": 1, "rate": 10**400}]}, "items[0].rate"),
        ({"items": [], "flag": 1}, "flag"),
        ({"items": [], "name": 1}, "name"),
    ],
)
def test_the_path_of_what_is_wrong_is_named(value: object, path: str) -> None:
    assert param(Outer, value) == path


@pytest.mark.parametrize("value", [1, "x", [], True])
def test_what_should_be_an_object_is_called_that(value: object) -> None:
    with pytest.raises(Refusal) as caught:
        validate(Outer, {"items": [value]})
    assert caught.value.message == "Invalid 'items[0]': input should be an object."


def test_a_tag_of_a_union_is_not_part_of_a_path() -> None:
    assert json_path(("messages", 0, "content", 1, "~text", "text")) == "messages[0].content[1].text"


def test_a_key_that_a_client_made_up_is_cut_in_a_path() -> None:
    assert json_path(("logit_bias", "x" * 10_000_000)) == f"logit_bias.{'x' * 64}..."
