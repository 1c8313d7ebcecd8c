r"""Draw the README's terminal pictures: the output of a command as SVG, with its colours.

    python notebooks/terminal.py first_run.svg python -m lit_gpt_scratch.fit
    python notebooks/terminal.py windows.svg python -m lit_gpt_scratch.prepare --data.source my_table.tsv \
        --data.cache cache --data.text_column message --data.block_size 384 --data.packing best_fit \
        --data.document_mask true --show 1

The command runs in a pseudo-terminal, so that it draws its progress bar; the picture shows the final screen.
Linux and macOS only. The table is paragraphs of Python's help topics:

    python -c "
    from pydoc_data.topics import topics
    rows = [' '.join(part.split()) for text in topics.values() for part in text.split('\n\n')]
    print('message', *(row for row in rows if 60 < len(row) < 250 and '\"' not in row), sep='\n')" > my_table.tsv
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


def capture_screen(command: list[str]) -> str:
    """Run a command and return its final screen; of the escape sequences only colours are kept."""
    output = bytearray()

    def read(terminal: int) -> bytes:
        if not output:
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        data = os.read(terminal, 1024)
        output.extend(data)
        return data

    if pty.spawn(command, read):
        sys.exit(f"{shlex.join(command)} failed")
    text = re.sub(
        r"\x1b\[[0-9;?]*[A-Za-ln-z]|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f]", "", output.decode(errors="replace")
    )
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join(map(apply_carriage_returns, lines))


def apply_carriage_returns(line: str) -> str:
    """The text that is visible after its carriage returns: each part overwrites the start of the one before."""
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()


def main(command: list[str], picture: Path) -> None:
    """Run a command and save its final screen as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(
        Text(f"$ {shlex.join(command)}\n", style="bold") + Text.from_ansi(capture_screen(command).strip("\n"))
    )
    console.save_svg(str(picture), title="lit_gpt_scratch")


if __name__ == "__main__":
    main(sys.argv[2:], Path(__file__).with_name(sys.argv[1]))
