"""Print the values of all flags of a mixed int and float type as JSON, in a process whose unions list one type first.

Run as a module, with the first type as its argument. ``typing`` keeps the order of the first union created, which
depends on the libraries installed.
"""

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Any, Optional, Union, get_args, get_origin

FIRST = {"int": (int, float), "float": (float, int)}


class UnionCreator:
    """Import hook that creates the unions again before each import, so that ``typing``'s cache never evicts them."""

    def __init__(self, members: tuple[type, type]) -> None:
        self.members = members

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> None:
        for union in (Union[self.members], Union[(*self.members, str)]):  # noqa: UP007 - | is not cached
            Optional[union]  # noqa: UP045


def mixes_numbers(hint: Any) -> bool:
    """Return whether a type hint contains a union of int and float."""
    members = get_args(hint)
    is_union = get_origin(hint) in (Union, UnionType)
    return (is_union and {int, float} <= {*members}) or any(map(mixes_numbers, members))


def classes() -> Iterator[type]:
    """Yield the classes whose arguments are flags."""
    import lightning as L

    yield L.Trainer
    ours = ("tasks", "data", "optim", "text.cleaning", "text.duplicates")
    for name in ("lightning.pytorch.callbacks", *(f"lit_gpt_scratch.{each}" for each in ours)):
        module = importlib.import_module(name)
        yield from (
            each for each in vars(module).values() if isinstance(each, type) and each.__module__.startswith(name)
        )
    for name in ("callbacks.checkpointing.Checkpointing", "callbacks.introspection.ActivationStats"):
        module_name, _, leaf = f"lit_gpt_scratch.{name}".rpartition(".")
        yield getattr(importlib.import_module(module_name), leaf)


def main() -> None:
    sys.meta_path.insert(0, UnionCreator(FIRST[sys.argv[1]]))  # type: ignore[arg-type]  # the part that is used
    from lit_gpt_scratch.cli.config_files import FitParser

    found = {}
    for kind in classes():
        parser = FitParser(exit_on_error=False)
        parser.add_class_arguments(kind, "x", fail_untyped=False)
        for action in parser._actions:
            if mixes_numbers(getattr(action, "_typehint", None)):
                required = {each.dest: "1" for each in parser._actions if each.required}
                flags = [f"--{name}={value}" for name, value in required.items()]
                given = [parser.parse_args([*flags, f"--{action.dest}={text}"]) for text in ("1", "1.0")]
                in_file = [parser.parse_object({**required, action.dest: value}) for value in (1, 1.0)]
                values = [config[action.dest] for config in (*given, *in_file)]
                found[f"{kind.__name__}.{action.dest.removeprefix('x.')}"] = values
    print(json.dumps(found))


if __name__ == "__main__":
    main()
