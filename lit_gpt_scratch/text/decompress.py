"""Files as they are, or compressed in one of the ways that their names tell."""

import bz2
import gzip
import lzma
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DECOMPRESSORS: Final[dict[str, Callable[[Path], Any]]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstd.open,
}  # fmt: skip
READ_ERRORS: Final = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError)
"""What reading a file can end in."""


def open_decompressed(path: Path) -> IO[bytes]:
    """A file's bytes, uncompressed if its name says so."""
    file: IO[bytes] = (
        DECOMPRESSORS[path.suffix.lower()](path) if path.suffix.lower() in DECOMPRESSORS else path.open("rb")
    )
    return file
