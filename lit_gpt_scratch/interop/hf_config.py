"""The fields of a ``config.json``, read one by one."""

import math
from pathlib import Path
from typing import Any, Final, NoReturn

from lit_gpt_scratch.errors import UserError

MAX_SIZE: Final = 1 << 31


class HFConfigReader:
    """Fields by name. What there is no switch for is gathered, so that one message can name all of it.

    Args:
        path: The file, for messages.
        values: What is in it.
        within: Of fields in a field: the outer one's name and a dot.
        refused: Where to gather.
    """

    def __init__(self, path: Path, values: dict[str, Any], within: str = "", refused: list[str] | None = None) -> None:
        self.path = path
        self.values = values
        self.within = within
        self.unsupported: list[str] = [] if refused is None else refused

    def nested(self, name: str) -> "HFConfigReader":
        """The fields in a field, none where it is absent or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            self._wrong(name, "null or an object")
        return HFConfigReader(self.path, value or {}, f"{self.within}{name}.", self.unsupported)

    def positive_int(self, name: str, absent: int | None = None, null: int | None = None) -> int:
        """A positive whole number.

        Args:
            name: Of the field.
            absent: What it is where the file does not have it; by default the file must.
            null: What it is where the file says null.

        Raises:
            UserError: It is something else.
        """
        value = self.values.get(name, absent)
        value = null if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < MAX_SIZE:
            self._wrong(name, "a positive whole number that a tensor can have")
        return value

    def number(self, name: str, absent: float | None = None) -> float:
        """Any number; null counts as absent.

        Raises:
            UserError: It is something else.
        """
        value = self.values.get(name)
        value = absent if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            self._wrong(name, "a number")
        return float(value)

    def boolean(self, name: str, absent: bool) -> bool:
        """True or false; null counts as absent.

        Raises:
            UserError: It is something else.
        """
        value = self.values.get(name)
        value = absent if value is None else value
        if not isinstance(value, bool):
            self._wrong(name, "true or false")
        return value

    def allow_only(self, name: str, *known: Any) -> None:
        """Gather a field that is there, is not null and is none of what is known."""
        value = self.values.get(name)
        if value is not None and value not in known:
            self.reject(name, f"only {' or '.join(map(str, known))}" if known else "only null")

    def reject(self, name: str, instead: str) -> None:
        """Gather a field, with its value and what it could be."""
        self.unsupported.append(f"{self.within}{name} is {_shorten(self.values.get(name))} ({instead})")

    def raise_if_unsupported(self) -> None:
        """Say what was gathered.

        Raises:
            UserError: Something was.
        """
        if self.unsupported:
            raise UserError(f"{self.path} asks for what this package does not have: {'; '.join(self.unsupported)}")

    def _wrong(self, name: str, wanted: str) -> NoReturn:
        said = _shorten(self.values[name]) if name in self.values else "missing"
        raise UserError(f"{self.path}: {self.within}{name} is {said}; it must be {wanted}")


def _shorten(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " and ".join(dict.fromkeys(value)) or "empty"  # of layers: which kinds there are
    said = str(value)
    return said if len(said) <= 80 else f"{said[:77]}..."
