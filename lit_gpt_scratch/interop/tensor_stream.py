"""Read and write tensors one at a time, so that a model larger than memory can be converted."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_gpt_scratch.errors import UserError

DTYPES: Final = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of data types in the safetensors format (https://huggingface.co/docs/safetensors)."""


LOADABLE_DTYPES: Final[dict[str, torch.dtype]] = {name: dtype for dtype, name in DTYPES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64,
}  # fmt: skip
"""Data types of the tensors in a safetensors file, keyed by their names in the format."""


class LazyTensors(Mapping[str, Tensor]):
    """Tensors keyed by name, each of which is read whenever it is accessed.

    Args:
        on_meta: Tensors with the same names, shapes and data types on the meta device.
        read: Function that reads the tensor with a given name.
    """

    def __init__(self, on_meta: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self.on_meta = on_meta
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.on_meta:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.on_meta)

    def __len__(self) -> int:
        return len(self.on_meta)


def on_meta(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors from which only names, shapes and data types can be read, without reading ``LazyTensors``."""
    return tensors.on_meta if isinstance(tensors, LazyTensors) else tensors


@overload
def select(tensors: LazyTensors, names: Mapping[str, str]) -> LazyTensors: ...
@overload
def select(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Mapping[str, Tensor]: ...
def select(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Return some of the tensors under other names, without reading ``LazyTensors``.

    Args:
        tensors: Tensors keyed by name.
        names: Map from new names to names in ``tensors``.
    """
    if not isinstance(tensors, LazyTensors):
        return {new: tensors[name] for new, name in names.items()}
    return LazyTensors({new: tensors.on_meta[name] for new, name in names.items()}, lambda new: tensors[names[new]])


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """Return the tensors whose names have a prefix, under their names without it."""
    return select(tensors, {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)})


def add_prefix(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """Return the tensors under their names after a prefix."""
    return select(tensors, {prefix + name: name for name in tensors})


def open_safetensors(path: Path, missing: str, invalid: str) -> tuple[LazyTensors, dict[str, str]]:
    """Open a safetensors file, whose tensors are read when they are accessed, and return its metadata, too.

    Args:
        path: Path to the file.
        missing: Message of the error if the file does not exist.
        invalid: Message of the error if the file is not a safetensors file, or is corrupted.

    Raises:
        UserError: The file is missing or corrupted; also raised when a tensor is read.
    """

    @contextmanager
    def explained() -> Iterator[Any]:  # untyped in safetensors
        try:
            with safe_open(str(path), framework="pt") as file:
                yield file
        except FileNotFoundError as error:
            raise UserError(missing) from error
        except (SafetensorError, OSError, UnicodeDecodeError) as error:
            raise UserError(invalid) from error

    def read(name: str) -> Tensor:
        with explained() as file:
            # A copy: the tensor could otherwise be a memory map of the file, which may change or be deleted.
            tensor: Tensor = file.get_tensor(name).clone()
        if (tensor.shape, tensor.dtype) != (shapes[name].shape, shapes[name].dtype):
            raise UserError(invalid)  # the file has changed
        return tensor

    with explained() as file:
        shapes = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            stored = file.get_slice(name)
            dtype = LOADABLE_DTYPES.get(stored.get_dtype(), torch.uint8)  # callers reject integers
            shapes[name] = torch.empty(stored.get_shape(), dtype=dtype, device="meta")
        return LazyTensors(shapes, read), file.metadata() or {}


def write_safetensors(
    file: BinaryIO,
    shapes: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file from tensors that are read one at a time.

    Args:
        file: The file, opened for writing bytes.
        shapes: Tensors with the shapes and data types of those in the file, in the same order; may be on the meta
            device.
        tensors: Names and values of the tensors.
        metadata: Metadata for the header.

    Raises:
        UserError: A data type is not supported.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in shapes.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"{name} has the data type {tensor.dtype}, which cannot be exported; convert the tensor")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the tensors are aligned
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for (name, tensor), (expected, shape) in zip(tensors, shapes.items(), strict=True):
        assert (name, tensor.shape, tensor.dtype) == (expected, shape.shape, shape.dtype)
        file.write(to_bytes(tensor))


def to_bytes(tensor: Tensor) -> memoryview:
    """Return the values of a tensor as bytes, without copying a contiguous tensor on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
