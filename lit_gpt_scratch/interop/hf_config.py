"""Read and validate the fields of a Hugging Face ``config.json``."""

import sys
from pathlib import Path
from typing import Any, Final, NoReturn

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.terminal_output import quote_short

MAX_SIZE: Final = 1 << 31
MAX_SHOWN: Final = 80
"""Maximum number of characters that an error message quotes from a value; the rest is omitted."""


class HFConfigReader:
    """Typed reader for config fields. Unsupported values are collected, so that a single error can list all of them.

    Args:
        path: Path to ``config.json``, used in error messages.
        values: Parsed JSON object of the file, or an object nested in it.
        prefix: Dotted path of the nested object, ending with a dot, or an empty string for the whole file.
        unsupported: List that collects unsupported values.
    """

    def __init__(
        self, path: Path, values: dict[str, Any], prefix: str = "", unsupported: list[str] | None = None
    ) -> None:
        self.path = path
        self.values = values
        self.prefix = prefix
        self.unsupported: list[str] = [] if unsupported is None else unsupported

    def nested(self, name: str) -> "HFConfigReader":
        """Return a reader for a nested object; the reader has no values if the field is missing or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            self._raise_invalid(name, "null or an object")
        return HFConfigReader(self.path, value or {}, f"{self.prefix}{name}.", self.unsupported)

    def positive_int(self, name: str, default: int | None = None, if_null: int | None = None) -> int:
        """Return the value of a field that must be a positive integer.

        Args:
            name: Field name.
            default: Value to use if the field is missing; if None, the field is required.
            if_null: Value to use if the field is null; if None, the field must not be null.

        Raises:
            UserError: The value is not a positive integer.
        """
        value = self.values.get(name, default)
        value = if_null if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < MAX_SIZE:
            self._raise_invalid(name, f"a positive integer below {MAX_SIZE}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return the value of a field that must be a finite number; null is treated as missing.

        Raises:
            UserError: The value is not a finite number.
        """
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            self._raise_invalid(name, "a number")
        return float(value)

    def positive_numbers(self, name: str) -> tuple[float, ...]:
        """Return the value of a field that must be a list of positive finite numbers.

        Raises:
            UserError: The value is not such a list.
        """
        values = self.values.get(name)
        if not isinstance(values, list) or not all(
            isinstance(n, int | float) and not isinstance(n, bool) and 0 < n <= sys.float_info.max for n in values
        ):
            self._raise_invalid(name, "a list of positive numbers")
        return tuple(map(float, values))

    def boolean(self, name: str, default: bool) -> bool:
        """Return the value of a field that must be true or false; null is treated as missing.

        Raises:
            UserError: The value is not a boolean.
        """
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            self._raise_invalid(name, "true or false")
        return value

    def allow_only(self, name: str, *supported: Any) -> None:
        """Record a field as unsupported unless it is missing, null, or one of the supported values."""
        value = self.values.get(name)
        if value is not None and value not in supported:
            self.reject(name, f"only {' or '.join(map(str, supported))}" if supported else "only null")

    def reject(self, name: str, requirement: str) -> None:
        """Record a field as unsupported, with its value and the requirement it violates."""
        self.unsupported.append(f"{self.prefix}{name} is {shorten(self.values.get(name))} ({requirement})")

    def raise_if_unsupported(self) -> None:
        """Raise an error that lists all unsupported values recorded so far.

        Raises:
            UserError: There are unsupported values.
        """
        if self.unsupported:
            raise UserError(f"{self.path} has unsupported values: {'; '.join(self.unsupported)}; use another model")

    def _raise_invalid(self, name: str, requirement: str) -> NoReturn:
        value = shorten(self.values[name]) if name in self.values else "missing"
        raise UserError(f"{self.path}: {self.prefix}{name} is {value}; it must be {requirement}")


def shorten(value: Any) -> str:
    """Describe a value from a file for an error message, in one short line without control characters."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = " and ".join(dict.fromkeys(value)) or "empty"  # e.g. the distinct layer types of layer_types
    return quote_short(str(value), MAX_SHOWN)
