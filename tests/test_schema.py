"""The reader of files from outside: types, depth, size, and messages of one short line."""

import json
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import NotRequired, TypedDict

from lit_gpt_scratch.schema import MAX_DEPTH, UnknownFieldError, parse_json, read_json, validate, validate_fields
from tests.mutations import DEPTH, REPLACEMENTS, nested, nested_json


@dataclass(frozen=True)
class Inner:
    size: int
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    rate: float = 0.5
    tags: list[str] = field(default_factory=list)
    limits: tuple[int, ...] = ()
    table: dict[str, int | None] = field(default_factory=dict)


class Open(TypedDict):
    size: int
    rate: NotRequired[float]


WHOLE = {
    "name": "x", "inner": {"size": 3, "kind": "b"}, "rate": 1, "tags": ["t"], "limits": [1, 2], "table": {"k": None}
}  # fmt: skip


def test_mapping_becomes_a_dataclass() -> None:
    built = validate(WHOLE, Outer)
    assert built == Outer("x", Inner(3, "b"), 1, ["t"], (1, 2), {"k": None})
    assert validate({"size": 1, "more": [2]}, Open) == {"size": 1, "more": [2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "content.name is 3; it must be text"),
        ({"name": "\ud800"}, "content.name is '\\ud800'; it must be text"),
        ({"inner": None}, "content.inner is null; it must be an object"),
        ({"inner": {}}, "content.inner has no field size"),
        ({"inner": {"size": True}}, "content.inner.size is true; it must be an integer"),
        ({"inner": {"size": 1.0}}, "content.inner.size is 1.0; it must be an integer"),
        ({"inner": {"size": 2**63}}, "content.inner.size is an integer of more than 64 bits; it must be an integer"),
        ({"inner": {"size": 1, "kind": "c"}}, "content.inner.kind is 'c'; it must be one of a, b"),
        ({"inner": {"size": 1, "kind": ["a"]}}, "content.inner.kind is a list; it must be one of a, b"),
        ({"rate": "fast"}, "content.rate is 'fast'; it must be a number"),
        ({"rate": False}, "content.rate is false; it must be a number"),
        ({"tags": ("t",)}, "content.tags is a list; it must be a list"),
        ({"tags": ["t", 1]}, r"content.tags[1] is 1; it must be text"),
        ({"tags": "t"}, "content.tags is 't'; it must be a list"),
        ({"limits": [1, None]}, "content.limits[1] is null; it must be an integer"),
        ({"table": {"k": "v"}}, "content.table.k is 'v'; it must be an integer or null"),
        ({"table": {3: 1}}, "a key of content.table is 3; it must be text"),
        ({"table": {"a b" * 99: "v"}}, "content.table.'a ba ba ba ba ba ba ba ba ba ba ba ba...' is 'v'"),
    ],
)
def test_wrong_types_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        validate(WHOLE | change, Outer, "content")
    assert str(refused.value).startswith(message)


def test_items_of_a_tuple_have_types_of_their_own() -> None:
    assert validate([1, 0.5], tuple[int, float]) == (1, 0.5)
    assert validate([1, 2, 3], tuple[int, ...]) == (1, 2, 3)
    for value, problem in (
        ([1, 2, 3], "the content has 3 items; it must have 2"),
        ([1], "the content has 1 items; it must have 2"),
        ([1, "x"], "the content[1] is 'x'; it must be a number"),
        ([0.5, 1], "the content[0] is 0.5; it must be an integer"),
    ):
        with pytest.raises(ValueError, match=re.escape(problem)):
            validate(value, tuple[int, float])


def test_every_type_of_a_union_is_tried() -> None:
    hint: Any = list[int] | list[str] | dict[str, int] | dict[str, list[int]]
    for value in ([1], ["x"], [], {"a": 1}, {"a": [1]}):
        assert validate(value, hint) == value
    with pytest.raises(ValueError, match="must be"):
        validate([1, "x"], hint)


def test_unknown_fields_are_told_from_damage() -> None:
    with pytest.raises(UnknownFieldError, match="the content has the unknown field 'later'"):
        validate(WHOLE | {"later": 1}, Outer)
    assert validate_fields({"size": 2}, Inner, "inner") == {"size": 2}


@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                          lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_any_value_matches_or_is_described_in_one_line(value: Any) -> None:
    for hint in (Outer, Open, int, float, bool, str, list[int], dict[str, float], tuple[str, ...]):
        try:
            validate(value, hint)
        except ValueError as error:
            message = str(error)
            assert "\n" not in message
            assert len(message) < 300


@pytest.mark.parametrize("make", REPLACEMENTS)
def test_replacements_are_described_in_few_characters(make: Any) -> None:
    with pytest.raises(ValueError) as refused:
        validate(make(), Outer)
    assert len(str(refused.value)) < 120
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (nested_json(), "nested more than"),
        ('{"a":' * DEPTH, "nested more than"),
        (json.dumps(nested(MAX_DEPTH + 1)), "nested more than"),
        (json.dumps(nested(MAX_DEPTH + 1, in_objects=True)), "nested more than"),
        ('{"a": 1, "a": 2}', "duplicate key"),
        ("9" * 10_000, "digit"),
        (b"\xff\xfe\x00", "decode"),
        ("", "Expecting value"),
    ],
)
def test_hostile_json(text: str | bytes, problem: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=problem):
        parse_json(text, object)
    assert time.process_time() - began < 2


def test_json_at_the_limits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    content = {"deep": nested(MAX_DEPTH - 1), "text": "é\U0001f389"}
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_json(path, dict[str, Any], path.stat().st_size) == content
    with pytest.raises(ValueError, match="more than"):
        read_json(path, dict[str, Any], path.stat().st_size - 1)
    assert math.isnan(parse_json("NaN", float))
