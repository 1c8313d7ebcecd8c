"""Read YAML files that may be corrupted or malicious, with bounded time and memory."""

from pathlib import Path
from typing import Any, Final

import yaml

from lit_gpt_scratch.errors import UserError, describe_yaml_error
from lit_gpt_scratch.schema import MAX_INT, describe

MAX_BYTES: Final = 2**18
"""Maximum size of a file in bytes; PyYAML would take several seconds to parse a larger file."""
MAX_NODES: Final = 100_000
"""Maximum number of values in a file; the values that an alias refers to are counted at each use."""
MAX_INTEGER_CHARACTERS: Final = 400
"""Maximum number of characters in an integer; converting a longer integer to text may fail."""
MAX_DEPTH: Final = 50
"""Maximum nesting depth of the values in a file."""


def load_yaml(path: Path) -> tuple[Any, str]:
    """Read a YAML file that contains only mappings, lists, strings, numbers, booleans and nulls.

    Mapping keys that are numbers, booleans or null are converted to their YAML text, such as ``true``.

    Returns:
        The parsed value, and the text of the file.

    Raises:
        UserError: The file cannot be read, is too large, is nested too deeply, or contains values of other types.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"cannot read {path}: it is larger than {MAX_BYTES >> 10} KB")
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    try:
        return _to_plain(parse_yaml(text)), text
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    except Exception as error:  # constructors raise many types, for example for a date with 13 months
        is_syntax = isinstance(error, yaml.YAMLError)
        message = describe_yaml_error(error) if is_syntax else " ".join(str(error).split())
        raise UserError(
            f"{path} is not valid YAML: {message if len(message) <= 200 else message[:200] + '...'}"
        ) from error


def parse_yaml(text: str) -> Any:
    """Check the size of YAML text, then parse it with ``yaml.SafeLoader``.

    Raises:
        UserError: The text is too large, is nested too deeply, or contains a recursive alias. The message begins with a
            verb, so that the caller can prepend the location.
        yaml.YAMLError: The text is not valid YAML.
        ValueError: A value cannot be represented, for example a date with 13 months.
    """
    require_bounded_yaml(text)
    return yaml.safe_load(text)


def require_bounded_yaml(text: str) -> None:
    """Check the size of YAML text before constructing its values, because YAML merge keys copy mappings.

    Raises:
        UserError: The text is too large, is nested too deeply, or contains a recursive alias or an integer of more than
            ``MAX_INTEGER_CHARACTERS`` characters.
        yaml.YAMLError: The text is not valid YAML.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"is larger than {MAX_BYTES >> 10} KB")
    try:
        node = yaml.SafeLoader(text).get_single_node()
    except RecursionError as error:
        raise UserError(f"is nested more than {MAX_DEPTH} levels deep") from error
    if node is not None:
        _count_nodes(node, {}, 1)


def _count_nodes(node: yaml.Node, sizes: dict[int, int | None], depth: int) -> int:
    """Count a node and all nodes below it, as if every alias were replaced with a copy.

    Args:
        node: Node of the parsed file; all aliases of a node are the same object.
        sizes: Node counts keyed by the ``id`` of the node, or None while the node is being counted.
        depth: Nesting depth of the node.

    Raises:
        UserError: The node contains itself, contains too many nodes or a long integer, or is nested too deeply.
    """
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise UserError("contains a YAML alias inside the value that it refers to; remove the alias")
        return size
    if depth > MAX_DEPTH:
        raise UserError(f"is nested more than {MAX_DEPTH} levels deep")
    if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_INTEGER_CHARACTERS:
        raise UserError(
            f"contains an integer of more than {MAX_INTEGER_CHARACTERS} characters; integers must be between "
            f"{-MAX_INT} and {MAX_INT}"
        )
    sizes[id(node)], size = None, 1
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    for child in children:
        for part in child if isinstance(child, tuple) else (child,):  # mappings have pairs
            size += _count_nodes(part, sizes, depth + 1)
    if size > MAX_NODES:
        raise UserError(f"has more than {MAX_NODES:,} values, possibly because of repeated aliases; remove some values")
    sizes[id(node)] = size
    return size


def _to_plain(value: Any) -> Any:
    """Convert all mapping keys to strings.

    Raises:
        UserError: A value has a type that JSON does not support, such as a date.
    """
    if isinstance(value, dict):
        plain = {_key_to_text(key): _to_plain(each) for key, each in value.items()}
        if len(plain) < len(value):
            raise UserError("contains a mapping with a duplicate key; remove one of the entries")
        return plain
    if isinstance(value, list):
        return [_to_plain(each) for each in value]
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= character <= "\udfff" for character in value)):
        raise UserError(
            f"contains {value[:40]!r}, which has a character that cannot be passed on a command line; "
            "remove the character"
        )
    if isinstance(value, int) and abs(value) > MAX_INT:
        raise UserError(f"contains {describe(value)}; integers must be between {-MAX_INT} and {MAX_INT}")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise UserError(f"contains {str(value)[:40]}, which YAML reads as a {type(value).__name__}; put it in quotes")


def _key_to_text(key: Any) -> str:
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    if isinstance(key, str | int | float):
        return str(_to_plain(key))
    raise UserError(f"has the key {str(key)[:40]}, which is a {type(key).__name__}; use only strings as keys")
