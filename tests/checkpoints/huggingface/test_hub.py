"""Pushing an export, against a local stand-in for the hub's HTTP interface."""

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from promot_jax.checkpoints.huggingface import hub
from promot_jax.errors import UserError

# Of the hub's client: it hands its HTTP library the bytes of a file in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
REPOSITORY = "org/name"


class Hub(http.server.ThreadingHTTPServer):
    """What the client asks of the hub to create a repository and to commit files, large ones over LFS."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}  # of the repository, by path
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: bytes) -> Any:
        path = path.partition("?")[0]
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.address}/{REPOSITORY}", "id": REPOSITORY}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == f"/api/models/{REPOSITORY}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return {
                "files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            }
        if path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.address}/lfs/{one['oid']}"}} for one in objects]
            found = [{**one, "actions": action} for one, action in zip(objects, actions, strict=True)]
            return {"transfer": "basic", "objects": found}
        if path == f"/api/models/{REPOSITORY}/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.objects[value["oid"]]
            return {"commitUrl": f"{self.address}/{REPOSITORY}/commit/0", "commitOid": "0" * 40, "hookOutput": ""}
        return None


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization", ""))
        answer = self.server.answer(self.path, self.rfile.read(int(self.headers["Content-Length"])))
        refused = {"error": "Invalid credentials"}
        self._send(401 if answer is None else 200, json.dumps(refused if answer is None else answer).encode())

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._send(200, b"")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""


@pytest.fixture(name="server")
def _server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        values = {"ENDPOINT": server.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
        yield server
        server.shutdown()
        thread.join()


def export(folder: Path) -> dict[str, str]:
    files = {
        "stripped/README.md": "---\ntags: []\n---\n",
        "stripped/model.safetensors": "weights",
        "with_prompts/model.safetensors": "more weights",
        "peft/review/adapter_config.json": "{}",
        "results.json": "not of the export",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return files


def test_push(server: Hub, tmp_path: Path) -> None:
    """The model without prompts is the repository itself; other folders lie in it; nothing else is sent."""
    files = export(tmp_path)
    assert hub.push(tmp_path, REPOSITORY, "stripped", ["with_prompts", "peft"]) == f"{server.address}/{REPOSITORY}"
    assert {name: content.decode() for name, content in server.files.items()} == {
        name.removeprefix("stripped/"): text for name, text in files.items() if name != "results.json"
    }
    (created,) = server.created
    assert (created["name"], created["organization"], created["visibility"]) == ("name", "org", "private")
    assert server.tokens == {"Bearer hf_of_the_test"}


def test_what_the_hub_refuses(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path)
    monkeypatch.setattr(Hub, "answer", lambda *_: None)
    with pytest.raises(UserError, match=r"Cannot push .* to org/name on the Hugging Face hub: .*401"):
        hub.push(tmp_path, REPOSITORY, "stripped", [])
    assert not server.files


@pytest.mark.parametrize("name", ["name", "org/name/more", "hf://org/name", ""])
def test_names_of_repositories(name: str) -> None:
    with pytest.raises(UserError, match="give it as ORGANISATION/NAME"):
        hub.check(name)
    hub.check(REPOSITORY)
