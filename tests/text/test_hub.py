"""Datasets of the Hub, against a local server that answers like the Hub."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"text": f"row {n}", "body": f"body {n}"} for n in range(600)]
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: train.jsonl
  - split: held_out
    path: held_out.jsonl
- config_name: other
  data_files: other.jsonl
---
"""


def _lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FILES = {
    "README.md": CARD.encode(),
    "train.jsonl": _lines(ROWS),
    "held_out.jsonl": _lines([{"text": "held out", "body": "b"}]),
    "other.jsonl": _lines([{"text": "of the other configuration"}]),
}


class _Hub(BaseHTTPRequestHandler):
    """The part of the Hub's API that ``datasets`` uses: repository info, its tree, and its files."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        about, files = "/api/datasets/owner/name", "/datasets/owner/name/resolve/"
        if path == about or path.startswith(f"{about}/revision/"):
            siblings = [{"rfilename": name} for name in FILES]
            self._json({"id": "owner/name", "sha": COMMIT, "tags": [], "siblings": siblings})
        elif path.startswith(f"{about}/tree/"):
            self._json([{"type": "file", "path": name, "size": len(FILES[name]), "oid": "0"} for name in FILES])
        elif path.startswith(files):
            name = path.removeprefix(files).partition("/")[2]
            tag = hashlib.sha1(FILES.get(name, b"")).hexdigest()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"', "X-Error-Code": "EntryNotFound"}
            self._send(200 if name in FILES else 404, FILES.get(name, b""), headers)
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _json(self, answer: Any) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """The address of a running server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


SCRIPT = """
import json, sys
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.sources import DocumentSource
for settings in json.loads(sys.argv[1]):
    source = DocumentSource("owner/name", **settings) if "name" not in settings else DocumentSource(**settings)
    try:
        found = [(document.id, document.text) for document in source.read()]
        print(json.dumps([source.fingerprint(), found]))
    except UserError as error:
        print(json.dumps(" ".join(str(error).split())))
"""


def read_sources(cases: list[dict[str, Any]], home: Path, **environment: str) -> list[Any]:
    """What each source yields, in a separate process: the library reads the Hub's address at import."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(cases)]
    without = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        command, capture_output=True, text=True, env={**without, "HF_HOME": str(home), **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_dataset_is_read_by_name(hub: str, tmp_path: Path) -> None:
    all_rows = [[f"owner/name:{n}", row["text"]] for n, row in enumerate(ROWS, 1)]
    expected = {
        "whole": ({}, [COMMIT, all_rows]),
        "streaming": ({"streaming": True}, [COMMIT, all_rows]),
        "column": ({"column": "body", "split": "held_out"}, [COMMIT, [["owner/name:1", "b"]]]),
        "config": ({"config": "other"}, [COMMIT, [["owner/name:1", "of the other configuration"]]]),
        "revision": ({"name": f"owner/name@{COMMIT}", "split": "held_out"}, [COMMIT, [["owner/name:1", "held out"]]]),
    }
    answers = read_sources([case for case, _ in expected.values()], tmp_path, HF_ENDPOINT=hub)
    assert dict(zip(expected, answers, strict=True)) == {name: answer for name, (_, answer) in expected.items()}


def test_missing_dataset_split_or_column_is_one_line(hub: str, tmp_path: Path) -> None:
    cases = [{"config": "nope"}, {"split": "test"}, {"column": "x"}, {"name": "owner/nothing"}]
    config, split, column, nothing = read_sources(cases, tmp_path, HF_ENDPOINT=hub)
    assert "'nope' not found. Available: ['default', 'other']" in config
    assert "Unknown split \"test\". Should be one of ['train', 'held_out']" in split
    assert "owner/name has no column 'x'; set --data.text_column to an existing column (text, body)" in column
    assert "no such file or folder: owner/nothing; the Hub has no dataset with this name" in nothing


@pytest.mark.slow
def test_offline_uses_what_was_downloaded(hub: str, tmp_path: Path) -> None:
    [fetched] = read_sources([{}], tmp_path, HF_ENDPOINT=hub)
    unreachable = "http://127.0.0.1:9"  # a port on which nothing listens
    [cannot] = read_sources([{}], tmp_path, HF_ENDPOINT=unreachable)
    assert "no such file or folder: owner/name; the Hub" in cannot
    assert "cannot be reached" in cannot
    assert "HF_HUB_OFFLINE=1" in cannot
    found, never = read_sources([{}, {"name": "owner/other"}], tmp_path, HF_ENDPOINT=unreachable, HF_HUB_OFFLINE="1")
    assert found == fetched
    assert "no such file or folder: owner/other" in never
