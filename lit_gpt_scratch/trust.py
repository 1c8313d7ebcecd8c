"""Restrict which custom classes and functions files may import.

A checkpoint, an adapter, a reward model or the config of a run can refer to a class, such as a custom attention class,
and importing a class runs the code of its module. Because files may come from other people, only the user decides what
is imported: ``--trust NAME`` allows exactly this import path, as does using the import path in another flag or in the
user's own config. Every file is checked by ``require_trusted`` before anything is built from it, and ``import_object``
is the only function that imports by name.
"""

import hashlib
import importlib
import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from platformdirs import user_state_path

from lit_gpt_scratch.errors import UserError

OWN_PACKAGES: Final = ("lit_gpt_scratch", "lightning")
"""Packages whose classes every config may import."""
IMPORT_PATH: Final = re.compile(r"(?<![\w./\\-])[^\W\d]\w*(?:\.[^\W\d]\w*)+(?![\w./\\-])")
"""Pattern that matches an import path that is not part of a file path."""
RECORD_FILE: Final = "written_configs"
"""Name of the file in the user's state folder that lists the SHA-256 digests of configs written by ``fit``."""

T = TypeVar("T")
Trusted = str | Collection[str] | None
"""Import paths that the user allows files to import."""


class UntrustedCodeError(UserError):
    """Raised if a file refers to code that the user does not trust.

    Attributes:
        name: Import path of the code.
        setting: Setting that contains the import path, if known.
    """

    def __init__(self, file: str, name: str, setting: str | None = None) -> None:
        super().__init__(f"{file} would run the custom code {name}; if you trust this code, pass --trust {name}")
        self.name = name
        self.setting = setting


def require_trusted(name: object, trusted: Trusted, file: object, setting: str | None = None) -> None:
    """Check that the user allows a file to import a class or function.

    Args:
        name: Import path that the file contains, or None if it contains none.
        trusted: Import paths that the user allows.
        file: Path to the file, used in error messages.
        setting: Setting that contains the import path, if known, such as ``model.gpt.attention``.

    Raises:
        UntrustedCodeError: The import path is not in ``trusted``.
    """
    allowed = {trusted} if isinstance(trusted, str) else frozenset(trusted or ())
    if name is not None and not (isinstance(name, str) and name in allowed):
        raise UntrustedCodeError(str(file), str(name), setting)


def import_object(path: str) -> Any:
    """Import a class or function by its import path; this runs the code of its module.

    Raises:
        ImportError, AttributeError, ValueError: The path cannot be imported.
    """
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def import_subclass(path: str, base: type[T], flag: str) -> type[T]:
    """Import a class by its import path, and check its base class; this runs the code of its module.

    Args:
        path: Import path, such as ``my_file.MyAttention``.
        base: Required base class.
        flag: Name of the setting that contains the path, used in error messages.

    Raises:
        UserError: The path cannot be imported, or does not refer to a subclass of ``base``.
    """
    try:
        found = import_object(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{flag} is {path}, which cannot be imported ({error}); set it to an import path such as "
            f"my_file.My{base.__name__}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"{flag} is {path}, which is not a subclass of {base.__module__}.{base.__name__}; set it to "
            f"the import path of a subclass"
        )
    return found


def find_import_paths(text: str) -> set[str]:
    """Return all substrings of a text that have the form of an import path, such as ``my_file.MyAttention``."""
    return set(IMPORT_PATH.findall(text))


def record_written_config(text: str, restricted: bool = False) -> None:
    """Record that ``fit`` wrote a config, so that the user can resume the run without passing ``--trust`` again.

    Only configs that are restricted or refer to code outside ``OWN_PACKAGES`` are recorded.

    Args:
        text: Text of the config file.
        restricted: Whether the config has settings that require ``--trust`` in configs written by other users.
    """
    if not restricted and all(path.partition(".")[0] in OWN_PACKAGES for path in find_import_paths(text)):
        return
    record = _record()
    with suppress(OSError):  # without a record, resuming requires --trust
        record.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(record, flags, 0o600), "w", encoding="ascii") as file:  # noqa: PTH123 - a descriptor
            file.write(f"{_digest(text)}\n")


def was_written_here(text: str) -> bool:
    """Return whether ``fit`` wrote this config for this user on this machine, and it has not been changed since."""
    try:
        return _digest(text) in _record().read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return False


def _record() -> Path:
    return user_state_path("lit_gpt_scratch") / RECORD_FILE


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
