"""``convert to-hf --push``, against a local server that answers like the Hub and checks what it is sent."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from lit_gpt_scratch.checkpoint.loading import load_model
from tests.end_to_end.conftest import Command
from tests.interop.conftest import (
    Published,
    library,
    published,  # noqa: F401 - a fixture
    tokenizer,  # noqa: F401 - a fixture
)

TOKENS = {"hf_writes": "write", "hf_reads": "read"}
LARGE = (".safetensors",)
"""Suffixes of files that are stored by their SHA-256 (Git LFS), as on the Hub."""


class Hub(ThreadingHTTPServer):
    """Repositories of models, keyed by name, with their files and whether they are private."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Requests(BaseHTTPRequestHandler):
    """The part of the Hub's API that uploading a folder uses."""

    server: Hub

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2" and self._role() is not None:
            self._answer(200, {"name": "owner", "type": "user"})
        else:
            self._answer(401, {"error": "Invalid user token."})

    def do_PUT(self) -> None:
        content = self._read()
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == digest
        self.server.objects[digest] = content
        self._answer(200, {})

    def do_POST(self) -> None:
        content = self._read()
        name = next((name for name in self.server.repositories if name in self.path), "")
        if self._role() != "write":
            self._answer(403, {"error": "this token may only read"})
        elif self.path == "/api/repos/create":
            asked = json.loads(content)
            full_name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            if full_name in self.server.repositories:
                self._answer(
                    409, {"error": "You already created this model repo", "url": f"{self.server.url}/{full_name}"}
                )
                return
            self.server.repositories[full_name] = {}
            self.server.private[full_name] = asked["visibility"] == "private"
            self._answer(200, {"url": f"{self.server.url}/{full_name}"})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.path == f"/api/models/{name}/preupload/main":
            files = json.loads(content)["files"]
            modes = {file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular" for file in files}
            self._answer(
                200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        elif self.path == f"/{name}.git/info/lfs/objects/batch":
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
                for each in json.loads(content)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif self.path == f"/api/models/{name}/commit/main":
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.repositories[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.repositories[name][value["path"]] = self.server.objects[value["oid"]]
            self._answer(
                200,
                {"success": True, "commitUrl": f"{self.server.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40},
            )
        else:
            self._answer(404, {"error": f"unknown: {self.path}"})

    def _role(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running server, which the library uses instead of the Hub, with a token that may write."""
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files are sent with plain HTTP requests
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_model_is_uploaded_and_loads_again(
    command: Command,
    published: Published,  # noqa: F811 - the fixture
    hub: Hub,
) -> None:
    transformers = library()
    _, model = published("llama")
    outcome = command("convert", "to-hf", model, "out", "--push", "owner/name", "--license", "mit")
    assert outcome.code == 0, outcome.err
    assert f"uploaded to {hub.url}/owner/name" in outcome.err
    assert hub.private == {"owner/name": True}
    files = hub.repositories["owner/name"]
    assert files == {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert b"license: mit" in files["README.md"]
    assert b'from_pretrained("owner/name")' in files["README.md"]
    Path("downloaded").mkdir()
    for name, content in files.items():
        Path("downloaded", name).write_bytes(content)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("downloaded").eval()
    ours, _ = load_model(model)
    x = torch.arange(20)[None]
    assert (theirs(x).logits - ours(x)).abs().max() <= 1e-5


def test_only_new_repositories_become_public(
    command: Command,
    published: Published,  # noqa: F811 - the fixture
    hub: Hub,
) -> None:
    _, model = published("llama")
    hub.repositories["owner/old"], hub.private["owner/old"] = {"README.md": b"old"}, True
    for n, name in enumerate(("owner/old", "owner/new")):
        outcome = command("convert", "to-hf", model, f"out{n}", "--push", name, "--public")
        assert outcome.code == 0, outcome.err
        assert hub.repositories[name]["README.md"] == Path(f"out{n}", "README.md").read_bytes()
    assert hub.private == {"owner/old": True, "owner/new": False}


@pytest.mark.parametrize(
    ("token", "flags", "message", "written"),
    [
        ("", ["--push", "owner/name"], "there is no token; run `hf auth login`, or set HF_TOKEN", False),
        (
            "hf_wrong",
            ["--push", "owner/name"],
            "cannot log in to the Hub: the Hub answers 401 (Invalid user token.",
            False,
        ),
        ("hf_reads", ["--push", "owner/name"], "cannot upload out, which is complete, to owner/name: the Hub", True),
        (
            "hf_writes",
            ["--push", "name"],
            "argument --push: name has no owner; it must have the form owner/name",
            False,
        ),
        ("hf_writes", ["--push", "owner/a--b"], "argument --push: ", False),
        ("hf_writes", ["--public"], "argument --public: the model is not uploaded; add --push owner/name", False),
    ],
)
def test_uploads_that_are_refused(
    command: Command,
    published: Published,  # noqa: F811 - the fixture
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    flags: list[str],
    message: str,
    written: bool,
) -> None:
    _, model = published("llama")
    monkeypatch.setenv("HF_TOKEN", token)
    outcome = command("convert", "to-hf", model, "out", *flags)
    assert outcome.code == 2
    assert message in outcome.err.splitlines()[-1]
    assert not token or token not in outcome.err
    assert Path("out").exists() == written
    assert not hub.repositories


def test_the_network_is_checked_before_the_model_is_exported(
    command: Command,
    published: Published,  # noqa: F811 - the fixture
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, model = published("llama")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # a port on which nothing listens
    outcome = command("convert", "to-hf", model, "out", "--push", "owner/name")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("error: cannot log in to the Hub: ")
    assert not Path("out").exists()
