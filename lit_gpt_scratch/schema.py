"""Validate untrusted files: parse JSON with size limits, and check plain data against type hints.

Errors are one-line ``ValueError``s that do not name the file; the caller adds the file and advice for the user.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from typing_extensions import is_typeddict

MAX_JSON_BYTES: Final = 2**24
"""Default maximum size of a JSON file in bytes; the parsed value may take about twenty times as much memory."""
MAX_DEPTH: Final = 64
"""Maximum nesting depth of a JSON file; it bounds the recursion of functions that copy, compare or write values."""
MAX_INT: Final = 2**63 - 1
"""Maximum absolute value of an integer; larger values do not fit into a tensor or an array."""
MAX_SEED: Final = 2**32 - 1
"""Largest seed of NumPy's global random number generator, which Lightning seeds."""
MAX_SHOWN: Final = 40
"""Maximum number of characters that an error message quotes from a value; the rest is omitted."""
TYPE_NAMES: Final[dict[Any, str]] = {
    int: "an integer", float: "a number", bool: "true or false", str: "text", list: "a list", tuple: "a list",
    dict: "an object", NoneType: "null",
}  # fmt: skip

T = TypeVar("T")


class UnknownFieldError(ValueError):
    """Raised for a field that this version does not recognize; the file may have been written by a newer version."""


def read_json(path: Path, hint: type[T], max_bytes: int = MAX_JSON_BYTES) -> T:
    """Read a JSON file and validate it against a type hint.

    Args:
        path: Path to the file.
        hint: Expected type of the parsed value; see ``validate``.
        max_bytes: Maximum size of the file in bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is too large, is not JSON, is nested too deeply, or does not match ``hint``.
    """
    with path.open("rb") as file:
        return parse_json(file.read(max_bytes + 1), hint, max_bytes)


def parse_json(text: str | bytes, hint: type[T], max_bytes: int = MAX_JSON_BYTES) -> T:
    """Parse JSON text and validate it against a type hint; see ``read_json``."""
    if len(text) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from error
    _require_depth(value)
    return validate(value, hint)


def validate(value: Any, hint: type[T], name: str = "the content") -> T:
    """Check plain data against a type hint.

    Args:
        value: Value made up of numbers, booleans, strings, None, lists and mappings.
        hint: A class, or a union, ``Literal``, ``list``, ``tuple`` or ``dict`` of classes. A mapping matches a
            dataclass if it has exactly the fields of the dataclass, and a ``TypedDict`` if it has all required keys of
            the ``TypedDict``. ``float`` also accepts integers; ``int`` and ``float`` do not accept booleans.
        name: Name of the value for error messages, with dots for nested fields.

    Returns:
        The value, with mappings converted to dataclasses and lists converted to tuples as required by ``hint``.

    Raises:
        UnknownFieldError: A mapping has a field that its dataclass does not have.
        ValueError: A value does not match the hint, or a field is missing.
    """
    result: T = _convert(value, hint, name)
    return result


def validate_fields(values: Any, cls: type, name: str) -> dict[str, Any]:
    """Validate a mapping as the fields of a dataclass, without building an instance; see ``validate``.

    Returns:
        The fields in ``values``; fields with a default may be missing.
    """
    if not isinstance(values, Mapping):
        raise _wrong_type(values, dict, name)
    hints = _field_hints(cls)
    for key in values:
        if key not in hints:
            raise UnknownFieldError(f"{name} has the unknown field {describe(key)}")
    for field in fields(cls):
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{name} has no field {field.name}")
    return {key: _convert(value, hints[key], f"{name}.{key}") for key, value in values.items()}


def describe(value: Any) -> str:
    """Return a short description of a value from a file for an error message, regardless of the value's size."""
    if isinstance(value, str):
        return repr(value if len(value) <= MAX_SHOWN else f"{value[: MAX_SHOWN - 3]}...")
    if isinstance(value, int) and abs(value) > MAX_INT:
        return "an integer of more than 64 bits"
    return json.dumps(value) if _is_scalar(value) else TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict and reject duplicate keys, because parsers differ in which of the values they keep."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a duplicate key")
    return found


def _convert(value: Any, hint: Any, name: str) -> Any:
    if not _matches(value, hint):
        raise _wrong_type(value, hint, name)
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        *others, last = [part for part in arguments if _matches(value, part)]
        for part in others:
            with suppress(ValueError):
                return _convert(value, part, name)
        return _convert(value, last, name)
    if is_dataclass(origin):
        return hint(**validate_fields(value, hint, name))
    if is_typeddict(origin):
        hints = get_type_hints(origin)
        if missing := sorted(origin.__required_keys__ - value.keys()):
            raise ValueError(f"{name} has no field {missing[0]}")
        return {key: _convert(item, hints.get(key, Any), f"{name}.{_short(key)}") for key, item in value.items()}
    if origin is list and arguments:
        return [_convert(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(value)]
    if origin is tuple and arguments:
        parts = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(value) != len(parts):
            raise ValueError(f"{name} has {len(value)} items; it must have {len(parts)}")
        pairs = enumerate(zip(value, parts, strict=True))
        return tuple(_convert(item, part, f"{name}[{i}]") for i, (item, part) in pairs)
    if origin is dict and arguments:
        for key in value:
            _convert(key, arguments[0], f"a key of {name}")
        return {key: _convert(item, arguments[1], f"{name}.{_short(key)}") for key, item in value.items()}
    return value


def _matches(value: Any, hint: Any) -> bool:
    """Return whether a value has the outermost type of a hint."""
    origin = get_origin(hint) or hint
    if origin in (Any, object):
        return True
    if origin in (Union, UnionType):
        return any(_matches(value, part) for part in get_args(hint))
    if origin is Literal:
        return _is_scalar(value) and any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if origin in (int, float):
        is_integer = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INT
        return is_integer or (origin is float and isinstance(value, float))
    if origin is str:
        return isinstance(value, str) and _is_unicode(value)
    if is_dataclass(origin) or is_typeddict(origin):
        return isinstance(value, Mapping)
    return isinstance(value, list | tuple if origin is tuple else origin)


def _wrong_type(value: Any, hint: Any, name: str) -> ValueError:
    return ValueError(f"{name} is {describe(value)}; it must be {_describe_type(hint)}")


def _describe_type(hint: Any) -> str:
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_describe_type, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    return (
        "an object" if is_dataclass(origin) or is_typeddict(origin) else TYPE_NAMES.get(origin, f"a {origin.__name__}")
    )


def _is_unicode(text: str) -> bool:
    """Return whether a string can be encoded as UTF-8; unpaired surrogates, which JSON may contain, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _short(key: Any) -> str:
    return key if isinstance(key, str) and key.isidentifier() and len(key) <= MAX_SHOWN else describe(key)


@cache
def _field_hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _require_depth(value: Any) -> None:
    """Check the nesting depth of a parsed value, without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for container in level
            if isinstance(container, dict | list)
            for item in (container.values() if isinstance(container, dict) else container)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
