"""Seeded mutations of valid files, for fuzz tests of readers: types, sizes, depths, missing and extra keys, bytes.

The same seed gives the same mutation, so a failing case can be repeated: ``mutate_json(value, random.Random(seed))``.
"""

import copy
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lit_gpt_scratch.errors import UserError

DEPTH = 20_000
"""Nesting depth at which recursive parsers fail."""


def nested(depth: int, in_objects: bool = False) -> Any:
    """Lists or objects nested ``depth`` levels deep."""
    value: Any = 0
    for _ in range(depth):
        value = {"a": value} if in_objects else [value]
    return value


def nested_json(depth: int = DEPTH) -> str:
    """JSON text of lists nested ``depth`` levels deep, which ``json.dumps`` could not write."""
    return "[" * depth + "]" * depth


REPLACEMENTS: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: True,
    list,
    dict,
    lambda: "",
    lambda: "x",
    lambda: "\ud800",
    lambda: "\x1b[31m\0\n",
    lambda: "../../outside",
    lambda: "y" * 100_000,
    lambda: 0,
    lambda: -1,
    lambda: 0.5,
    lambda: 10**9,
    lambda: 2**31 - 1,
    lambda: 2**63,
    lambda: 10**400,
    lambda: 1e308,
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: ["x", 1, None],
    lambda: {"x": 1},
    lambda: [[[]]],
    lambda: nested(90),
    lambda: nested(90, in_objects=True),
)
"""Values of other types and sizes, all of which ``json.dumps`` can write."""


def refuse_in_one_line(read: Callable[[], object], longest: int = 2000) -> str:
    """Check that a reader raises a ``UserError`` of one line within five seconds of processor time; return the line."""
    began = time.process_time()
    with pytest.raises(UserError) as refused:
        read()
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < longest
    assert time.process_time() - began < 5
    return str(refused.value)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return a copy of a JSON value in which one or two places have been changed, removed or added."""
    mutated = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        places = list(_places(mutated))
        if not places:
            return rng.choice(REPLACEMENTS)()
        # By depth: the many entries of a vocabulary would otherwise hide the few settings above them.
        depth = rng.choice(sorted({depth for depth, _, _ in places}))
        _, parent, key = rng.choice([place for place in places if place[0] == depth])
        match rng.choice(("replace", "replace", "replace", "remove", "add", "copy", "grow")):
            case "replace":
                parent[key] = rng.choice(REPLACEMENTS)()
            case "remove":
                del parent[key]
            case "add" if isinstance(parent, dict):
                parent[rng.choice(("extra", "", "\ud800", "__class__", "0"))] = rng.choice(REPLACEMENTS)()
            case "add":
                parent.insert(rng.randint(0, len(parent)), rng.choice(REPLACEMENTS)())
            case "copy":
                parent[key] = copy.deepcopy(rng.choice(places)[1])
            case "grow":
                parent[key] = _grow(parent[key], rng)
    return mutated


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return a copy of a file's bytes that is truncated, or has bytes changed, removed, inserted or repeated."""
    mutated = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        start = rng.randint(0, len(mutated))
        # Most formats begin with a header.
        start = min(start, rng.choice((start, 16, 200)))
        size = rng.choice((1, 1, 2, 8, 100))
        match rng.choice(("flip", "flip", "truncate", "remove", "insert", "overwrite", "repeat")):
            case "flip" if start < len(mutated):
                mutated[start] ^= 1 << rng.randrange(8)
            case "truncate":
                del mutated[start:]
            case "remove":
                del mutated[start : start + size]
            case "overwrite":
                mutated[start : start + size] = rng.choice((b"\0", b"\xff", b"9", b"[")) * size
            case "repeat":
                mutated[start:start] = mutated[start : start + size] * rng.choice((1, 10))
            case _:
                mutated[start:start] = rng.randbytes(size)
    return bytes(mutated)


def _places(value: Any, depth: int = 0) -> Iterator[tuple[int, Any, Any]]:
    """Yield (depth, container, key or index) of every value inside a JSON value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield depth, value, key
            yield from _places(value[key], depth + 1)


def _grow(value: Any, rng: random.Random) -> Any:
    """Return a larger or a negative value of the same type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return rng.choice((-value, value + 1, value * 1000, value * 10**12))
    if isinstance(value, str):
        return rng.choice((value * 3, value[:-1], value.upper(), value[::-1]))
    if isinstance(value, list):
        return value * rng.choice((2, 1000 if len(value) < 10 else 2))
    if not isinstance(value, dict):  # a tensor
        return [value]
    return value | {f"{key}2": entry for key, entry in list(value.items())[:3]}
