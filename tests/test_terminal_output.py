"""Output streams: control characters are escaped, and failed writes end or do not end a command."""

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tqdm import tqdm

from lit_gpt_scratch.cli import entrypoint
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.terminal_output import OutputStream, training_output, write_exact, write_generated
from tests.hostile import HOSTILE
from tests.text.test_markdown import is_control

log = logging.getLogger("lit_gpt_scratch.tests")


def has_controls(text: str) -> bool:
    return any(map(is_control, text.replace("\n", "").replace("\t", "")))


def run(main: Callable[[], None]) -> int | str | None:
    try:
        entrypoint.run(main)
    except SystemExit as error:
        return error.code
    return 0


@pytest.mark.parametrize("name", HOSTILE)
def test_every_way_to_print_is_escaped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text = HOSTILE[name]
    # pytest-xdist cannot send a captured log message that contains a surrogate.
    monkeypatch.setattr(logging.getLogger("lit_gpt_scratch"), "propagate", False)

    def main() -> None:
        print(text, text)
        sys.stdout.write(text)
        print(f"library: {text}", file=sys.stderr)
        log.info("%s and %s, %d of %.1f", text, Path(text.replace("\0", "")), 3, 0.5)
        log.warning("in a message: " + text)
        with tqdm(["a", "b"], desc=f"bar {text}", disable=False) as bar:
            bar.set_postfix_str(text)
        raise UserError(f"file {text} is wrong")

    assert run(main) == 2
    out, err = capsys.readouterr()
    assert not has_controls(out)
    assert not has_controls(err.replace("\r", ""))  # of the bar
    assert err.splitlines()[-1].startswith("error: file ")


def test_arguments_of_log_messages_cannot_forge_lines(capsys: pytest.CaptureFixture[str]) -> None:
    run(lambda: log.info("\nreading %s\nnow", Path("a\nerror: forged")))
    assert capsys.readouterr().err == "\nreading a\\nerror: forged\nnow\n"


def test_a_bug_keeps_its_traceback_but_not_its_control_characters() -> None:
    program = (
        "from lit_gpt_scratch.cli import entrypoint\n"
        "def main():\n    raise RuntimeError('text \\x1b[31m')\n"
        "entrypoint.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError: text \\x1b[31m" in done.stderr


def test_passwords_are_hidden_in_messages(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        log.info("opening %s", "postgresql://me:hunter2@host/db?password=hunter2")
        raise UserError("unrecognized arguments: --storag postgresql://me:hunter2@host/db")

    run(main)
    assert "hunter2" not in capsys.readouterr().err


def test_long_errors_are_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError(f"column {'x' * 100_000} is missing")

    run(main)
    line = capsys.readouterr().err
    assert line.startswith("error: column xxx")
    assert line.endswith("xxx is missing\n")
    assert len(line) < 2100


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shown"), [(_Terminal(), "a\\x1b[31m\tb\n"), (io.StringIO(), "a\x1b[31m\tb\n")])
def test_generated_text_is_exact_unless_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, shown: str
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    run(lambda: write_generated("a\x1b[31m\tb\n"))
    assert stream.getvalue() == shown


class _Failing(io.StringIO):
    """A stream to a full disk, a closed pipe or a closed terminal."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


ERRORS = {
    "full": OSError(28, "No space left on device"),
    "terminal": OSError(5, "Input/output error"),
    "pipe": BrokenPipeError(32, "Broken pipe"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_lost_messages_do_not_end_a_command(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "stderr", _Failing(ERRORS[name]))
    ended = []

    def main() -> None:
        log.warning("a message")
        for _ in tqdm(range(3), disable=False, mininterval=0):
            tqdm.write("text", file=sys.stderr)
        ended.append(True)

    assert run(main) == 0
    assert ended
    monkeypatch.setattr(sys, "stderr", None)
    assert run(main) == 0
    assert len(ended) == 2


@pytest.mark.parametrize(("name", "code", "shown"), [("full", 2, "No space left"), ("pipe", 141, "")])
def test_a_lost_result_ends_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, code: int, shown: str
) -> None:
    monkeypatch.setattr(sys, "stdout", _Failing(ERRORS[name]))
    for main in (lambda: print("a result", flush=True), lambda: write_exact("a result"), lambda: sys.exit(0)):
        assert run(main) == code
        assert shown in capsys.readouterr().err


def test_training_may_lose_what_its_callbacks_print(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        with training_output():
            print("a bar", flush=True)

    monkeypatch.setattr(sys, "stdout", _Failing(ERRORS["full"]))
    with pytest.raises(SystemExit):  # a stream that fails only now is noticed at the last flush
        entrypoint.run(main)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)

    def colored() -> None:
        with training_output():
            print("\x1b[31mbar")
        print("\x1b[31mtext")

    assert run(colored) == 0
    assert stream.getvalue() == "\x1b[31mbar\n\\x1b[31mtext\n"


def test_streams_are_restored(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    for main in (lambda: None, lambda: sys.exit(3)):
        run(main)
        assert (sys.stdout, sys.stderr) == before


def test_other_attributes_are_those_of_the_stream(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w", encoding="utf-8") as file:
        stream = OutputStream(file, is_result=True)
        assert (stream.fileno(), stream.encoding, stream.isatty()) == (file.fileno(), "utf-8", False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("redirected", "code", "error"),
    [
        ("> /dev/full", 2, "error: cannot write to standard output: No space left on device\n"),
        (">&-", 2, "error: cannot write to standard output: it is closed\n"),
        ("2>&-", 0, ""),
        ("2> /dev/full", 0, ""),
        ("> /dev/full 2>&1", 2, ""),
        (">&- 2>&- <&-", 2, ""),
        ("unknown 2> /dev/full", 2, ""),
        ("unknown 2>&-", 2, ""),
    ],
)
def test_exit_codes_of_real_processes(redirected: str, code: int, error: str) -> None:
    """Also at the exit of the interpreter, which flushes once more."""
    command = ["bash", "-c", f"{sys.executable} -m lit_gpt_scratch {redirected}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, error)


def test_a_pipe_closed_early_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "lit_gpt_scratch"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_closed_descriptors_are_not_taken_by_files(tmp_path: Path) -> None:
    """Otherwise, what a child process prints would be written into the file that took descriptor 1."""
    program = tmp_path / "program.py"
    program.write_text(
        "import subprocess\n"
        "from lit_gpt_scratch.cli import entrypoint\n"
        "def main():\n"
        "    with open('file', 'w') as file:\n"
        "        subprocess.run(['sh', '-c', 'echo printed; echo printed >&2'])\n"
        "        file.write(str(file.fileno()))\n"
        "entrypoint.run(main)",
        encoding="utf-8",
    )
    subprocess.run(
        ["bash", "-c", f"{sys.executable} program.py <&- >&- 2>&-"],
        cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    text = (tmp_path / "file").read_text(encoding="utf-8")
    assert "printed" not in text
    assert int(text) > 2
