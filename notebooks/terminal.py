r"""Draw the README's pictures of a terminal: what a command says, as a person sees it.

    python notebooks/terminal.py first_run.svg python -m lit_gpt_scratch.fit
    python notebooks/terminal.py windows.svg python -m lit_gpt_scratch.prepare --data.source my_table.tsv \
        --data.cache cache --data.text_column message --data.block_size 384 --data.packing best_fit \
        --data.document_mask true --show 1

The command runs in a pseudo-terminal, so that it draws its progress bar; the picture shows the screen at the end.
For Linux and macOS.
"""

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import sys
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, LINES = 130, 60


def screen(command: list[str]) -> str:
    """Run a command; what its terminal shows at the end, escape sequences carried out or dropped, but for colours."""
    written = bytearray()

    def read(terminal: int) -> bytes:
        if not written:
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        data = os.read(terminal, 1024)
        written.extend(data)
        return data

    if pty.spawn(command, read):
        sys.exit(f"{shlex.join(command)} failed")
    # Of the escape sequences, only colours stay.
    text = re.sub(
        r"\x1b\[[0-9;?]*[A-Za-ln-z]|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f]", "", written.decode(errors="replace")
    )
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join(map(overwritten, lines))


def overwritten(line: str) -> str:
    """A carriage return goes back to the line's beginning, and what follows covers what was there."""
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()


def main(command: list[str], picture: Path) -> None:
    """Write an SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text(f"$ {shlex.join(command)}\n", style="bold") + Text.from_ansi(screen(command).strip("\n")))
    console.save_svg(str(picture), title="lit_gpt_scratch")


if __name__ == "__main__":
    main(sys.argv[2:], Path(__file__).with_name(sys.argv[1]))
