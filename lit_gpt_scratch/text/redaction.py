"""Removal of passwords and tokens from messages, reports and recorded commands."""

import re
from collections.abc import Sequence
from typing import Final

HIDDEN: Final = "***"
_NAME: Final = (
    r"(?:(?:pg|ssl)?pass(?:word|wd|phrase|file)?|pwd|secret|(?:auth|access)?token|credentials?|signature|sig|sslkey|"
    r"(?:api|access|secret|private)[_-]?key(?:[_-]?id)?)"
)
"""Last part of the names of secrets, such as ``sslpassword``, ``X-Amz-Signature`` or ``trainer.logger.api_key``."""
_VALUE: Final = r"(?:\"[^\"]*\"|'[^']*'|[^\s&;,\"'}]+)"
_URL: Final = re.compile(r"(?<![\w+.-])([\w+.-]+://)[^\s\"']*@")
_SETTING: Final = re.compile(rf"(?<![^\W_])({_NAME}=){_VALUE}", re.IGNORECASE)
_JSON_FIELD: Final = re.compile(rf"(?<![^\W_])({_NAME}[\"']\s*:\s*){_VALUE}", re.IGNORECASE)
_FLAG: Final = re.compile(rf"--(?:.*[._-])?{_NAME}", re.IGNORECASE)


def redact(text: str) -> str:
    """Replace the user and password of each URL, and each value that is named as a secret, with ``***``."""
    text = _URL.sub(rf"\1{HIDDEN}@", text)
    return _JSON_FIELD.sub(rf"\1{HIDDEN}", _SETTING.sub(rf"\1{HIDDEN}", text))


def redact_command(arguments: Sequence[str]) -> list[str]:
    """Apply ``redact`` to command-line arguments, and hide the argument after a flag that takes a secret."""
    follows = (False, *(bool(_FLAG.fullmatch(argument)) for argument in arguments))
    return [HIDDEN if secret else redact(argument) for argument, secret in zip(arguments, follows, strict=False)]
