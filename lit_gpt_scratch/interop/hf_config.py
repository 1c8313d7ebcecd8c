"""Read and validate the fields of a Hugging Face ``config.json``."""

import math
from pathlib import Path
from typing import Any, Final, NoReturn

from lit_gpt_scratch.errors import UserError

MAX_SIZE: Final = 1 << 31


class HFConfigReader:
    """Typed access to config fields. Unsupported values are collected, so that one error can list all of them.

    Args:
        path: The file, for error messages.
        values: Its content.
        prefix: Path of a nested object, ending with a dot.
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
        """Reader of a nested object; empty if the field is missing or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            self._raise_invalid(name, "null or an object")
        return HFConfigReader(self.path, value or {}, f"{self.prefix}{name}.", self.unsupported)

    def positive_int(self, name: str, default: int | None = None, if_null: int | None = None) -> int:
        """A positive integer.

        Args:
            name: Field name.
            default: Value if the field is missing; without it, the field is required.
            if_null: Value if the field is null.

        Raises:
            UserError: The value is something else.
        """
        value = self.values.get(name, default)
        value = if_null if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < MAX_SIZE:
            self._raise_invalid(name, f"a positive integer below {MAX_SIZE}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; null counts as missing.

        Raises:
            UserError: The value is something else.
        """
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            self._raise_invalid(name, "a number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false; null counts as missing.

        Raises:
            UserError: The value is something else.
        """
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            self._raise_invalid(name, "true or false")
        return value

    def allow_only(self, name: str, *supported: Any) -> None:
        """Collect a field as unsupported, unless it is missing, null or one of the supported values."""
        value = self.values.get(name)
        if value is not None and value not in supported:
            self.reject(name, f"only {' or '.join(map(str, supported))}" if supported else "only null")

    def reject(self, name: str, requirement: str) -> None:
        """Collect a field as unsupported, with its value and the supported ones."""
        self.unsupported.append(f"{self.prefix}{name} is {_shorten(self.values.get(name))} ({requirement})")

    def raise_if_unsupported(self) -> None:
        """Report everything that was collected.

        Raises:
            UserError: There are unsupported values.
        """
        if self.unsupported:
            raise UserError(f"{self.path} has unsupported values: {'; '.join(self.unsupported)}")

    def _raise_invalid(self, name: str, requirement: str) -> NoReturn:
        value = _shorten(self.values[name]) if name in self.values else "missing"
        raise UserError(f"{self.path}: {self.prefix}{name} is {value}; it must be {requirement}")


def _shorten(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " and ".join(dict.fromkeys(value)) or "empty"  # the distinct types of a list of layers
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
