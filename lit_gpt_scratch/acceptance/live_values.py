"""Pass values from ``fit`` to the row that runs it in the same process, while ``fit`` is running."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lit_gpt_scratch.acceptance.row import Values

_listeners: list[Callable[[Values], None]] = []


def report(values: Values) -> None:
    """Add values to the row that runs in this process; in other processes, such as further ranks, do nothing."""
    for listener in _listeners:
        listener(values)


@contextmanager
def listening(listener: Callable[[Values], None]) -> Iterator[None]:
    """Context manager that passes all reported values to a function."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
