"""Seeded mutations of valid files, for fuzz tests of readers: types, sizes, depths, missing and extra keys, bytes.

The same seed gives the same mutation, so a failing case can be repeated: ``mutate_json(value, random.Random(seed))``.
``fuzz`` counts what readers make of them.
"""

import copy
import json
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
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


def mutate_events(data: bytes, rng: random.Random) -> bytes:
    """Return a copy of a TensorBoard event file with other events, or with damaged records or bytes.

    The checksums are right, unless the bytes of the file are changed.
    """
    records = list(_split_records(data))
    match rng.choice(("file", "record", "length", "fields", "fields", "curve", "curve", "order")):
        case "file":
            return mutate_bytes(data, rng)
        case "record":
            nth = rng.randrange(len(records))
            records[nth] = mutate_bytes(records[nth], rng)
        case "length":  # a record that claims to be longer than the file
            nth, size = rng.randrange(len(records)), rng.choice((2**20, 2**31, 2**40, 2**63, 2**64 - 1))
            whole = join_records(records[:nth])
            return whole + _with_checksum(struct.pack("<Q", size)) + data[len(whole) + 12 :]
        case "fields":
            records = _mutate_fields(records, rng)
        case "curve":
            records = _mutate_curve(records, rng)
        case _:
            rng.shuffle(records)
    return join_records(records)


def join_records(records: Iterable[bytes]) -> bytes:
    """Return an event file with these records."""
    return b"".join(_with_checksum(struct.pack("<Q", len(each))) + _with_checksum(each) for each in records)


def _split_records(data: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(data):
        (size,) = struct.unpack("<Q", data[start : start + 8])
        yield data[start + 12 : start + 12 + size]
        start += 16 + size


def _with_checksum(data: bytes) -> bytes:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    return data + struct.pack("<I", masked_crc32c(data))


def _mutate_fields(records: list[bytes], rng: random.Random) -> list[bytes]:
    """Change fields of some events to other values of their types."""
    from google.protobuf.json_format import MessageToDict, ParseDict
    from tensorboard.compat.proto.event_pb2 import Event

    mutated = list(records)
    for _ in range(rng.choice((1, 3, 10))):
        nth = rng.randrange(len(records))
        event = MessageToDict(Event.FromString(records[nth]))
        for _ in range(20):
            changed = mutate_json(event, rng)
            for _, parent, key in _places(changed):
                if isinstance(parent[key], float) and rng.random() < 0.3:
                    parent[key] = rng.choice(("NaN", "Infinity", "-Infinity", 0.0, -1.0, 1e38))
            try:
                mutated[nth] = ParseDict(changed, Event(), ignore_unknown_fields=True).SerializeToString()
            except Exception:  # of many types: the mutation is no event
                continue
            break
    return mutated


CURVE_VALUES = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1.0, 1e-38, 3e38, -3e38)
CURVE_STEPS = (0, 1, -1, -(2**63), 2**63 - 1, 10**12)


def _mutate_curve(records: list[bytes], rng: random.Random) -> list[bytes]:
    """Change all values, steps or times of one or two curves, or of all."""
    from tensorboard.compat.proto.event_pb2 import Event

    events = [Event.FromString(record) for record in records]
    tags = sorted({value.tag for event in events for value in event.summary.value})
    for _ in range(rng.choice((1, 1, 2))):
        chosen = {rng.choice(tags)} if rng.random() < 0.9 else set(tags)
        what, constant = rng.choice(("value", "value", "value", "step", "time", "shape", "text")), rng.random() < 0.6
        number, step = rng.choice(CURVE_VALUES), rng.choice(CURVE_STEPS)
        for event in events:
            for value in event.summary.value if chosen & {value.tag for value in event.summary.value} else ():
                if not constant:
                    number, step = rng.choice(CURVE_VALUES), rng.choice(CURVE_STEPS)
                if value.tag not in chosen:
                    continue
                if what == "value" and value.HasField("simple_value"):
                    value.simple_value = number
                elif what == "value" and value.HasField("tensor"):
                    value.tensor.float_val[:] = [number]
                elif what == "step":
                    event.step = step
                elif what == "time":
                    event.wall_time = number
                elif what == "text":
                    value.tensor.string_val[:] = [rng.choice((b"", b"|", b"a\n|x|\n|", b"\xff", b"|1" * 30_000))]
                else:
                    value.tensor.dtype = rng.choice((1, 2, 3, 7, 8, 9, 14, 19, 20, 99))
                    del value.tensor.tensor_shape.dim[:]
                    for size in rng.choice(((), (0,), (1,), (2**40,), (-1,), (2**32, 2**32), (3, 3), (1,) * 40)):
                        value.tensor.tensor_shape.dim.add().size = size
    return [event.SerializeToString() for event in events]


class NotWritableError(Exception):
    """Raised by an attempt of ``fuzz`` if its mutation cannot be written, so that it does not count."""


MAX_SECONDS = 5.0
"""Processor time after which a reader hangs."""
WALL_SECONDS = 60.0
"""Time after which a reader is interrupted."""
MAX_MESSAGE = 4000
"""Maximum length of an error message."""


def fuzz(
    name: str,
    folder: Path,
    seeds: Iterable[int],
    attempt: Callable[[int, random.Random], object],
    max_seconds: float = MAX_SECONDS,
    cache: Path | None = None,
) -> None:
    """Give mutations to a reader, print the counts, and fail if any of them is not zero.

    Args:
        name: Name of the format.
        folder: Folder in which files may be written.
        seeds: Seed of each mutation.
        attempt: Function of a seed and its random number generator that reads a mutated file. It may raise a
            ``UserError`` of one line.
        max_seconds: Processor time after which a reader hangs.
        cache: Another folder in which files may be written.
    """
    n, refused = 0, 0
    faults: dict[str, list[str]] = {"tracebacks": [], "hangs": [], "written outside": [], "bad messages": []}
    for seed in seeds:
        began, error = time.process_time(), None
        with _writes() as written:
            try:
                with _interrupted_after(WALL_SECONDS):
                    attempt(seed, random.Random(seed))
            except NotWritableError:
                continue
            except UserError as raised:
                refused += 1
                error = str(raised)
            except _HangError:
                faults["hangs"].append(f"seed {seed}: more than {WALL_SECONDS:.0f} s")
            except KeyboardInterrupt:
                raise
            except BaseException as raised:  # panics of Rust libraries are no Exceptions
                faults["tracebacks"].append(f"seed {seed}: {_describe(raised)}")
        n += 1
        if (seconds := time.process_time() - began) > max_seconds:
            faults["hangs"].append(f"seed {seed}: {seconds:.1f} s of processor time")
        if error is not None and ("\n" in error or len(error) > MAX_MESSAGE):
            faults["bad messages"].append(f"seed {seed}: {error[:500]!r}")
        outside = [path for path in written if not any(_is_inside(path, each) for each in (folder, cache) if each)]
        faults["written outside"] += [f"seed {seed}: {path}" for path in outside]
    counts = {"format": name, "mutations": n, "refused": refused, **{what: len(each) for what, each in faults.items()}}
    print(json.dumps(counts))
    assert not any(faults.values()), "\n".join(f"{what}: {each}" for what, found in faults.items() for each in found)


class _HangError(BaseException):
    pass


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__}: {str(error)[:300]} ({where})"


def _is_inside(path: str, folder: Path) -> bool:
    found = Path(path).resolve()
    return found.is_relative_to(folder.resolve()) or found == Path(os.devnull)


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise _HangError

    before = signal.signal(signal.SIGALRM, interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


_recorded: list[list[str]] = []
_hooked = False
CHANGES = {
    "os.link": (slice(2), slice(2, 4)), "os.mkdir": (slice(1), slice(2, 3)), "os.remove": (slice(1), slice(1, 2)),
    "os.rename": (slice(2), slice(2, 4)), "os.rmdir": (slice(1), slice(1, 2)), "os.truncate": (slice(1), slice(0)),
    "os.symlink": (slice(1, 2), slice(2, 3)),
}  # fmt: skip
"""Audit events of changes to files: the positions of the paths, and of the folder descriptors they are relative to."""


@contextmanager
def _writes() -> Iterator[list[str]]:
    """Record the paths that Python code opens for writing, creates, renames or deletes."""
    global _hooked
    if not _hooked:
        _hooked = True
        sys.addaudithook(_audit)  # cannot be removed
    found: list[str] = []
    _recorded.append(found)
    try:
        yield found
    finally:
        _recorded.pop()


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _recorded:
        return
    if event == "open":
        path, _, flags = args
        if isinstance(path, str | bytes | os.PathLike) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            _recorded[-1].append(os.fsdecode(path))
    elif event in CHANGES:
        paths, descriptors = CHANGES[event]
        if all(each == -1 for each in args[descriptors]):  # otherwise, its folder was opened by its path before
            _recorded[-1].extend(os.fsdecode(path) for path in args[paths] if isinstance(path, str | bytes))


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
