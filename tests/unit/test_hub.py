"""`export --push` against a server on this machine that speaks the hub's protocol: making, asking, one commit."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rewardtune.errors import RecipeError
from rewardtune.training import hub


class Hub(ThreadingHTTPServer):
    """Keeps what it is sent; `refuse` is the status with which it answers a new repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.made: dict[str, Any] = {}
        self.tokens: set[str | None] = set()
        self.files: dict[str, bytes] = {}
        self.summary = ""
        self.refuse = 0


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        address = f"http://127.0.0.1:{self.server.server_port}/team/tuned"
        if self.path == "/api/repos/create":
            self.server.made = json.loads(body)
            answer: Any = {"error": "no right to write here"} if self.server.refuse else {"url": address}
        elif self.path == "/api/validate-yaml":  # of the card
            answer = {"errors": [], "warnings": []}
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
        else:
            assert self.path == "/api/models/team/tuned/commit/main"
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.summary = line["value"]["summary"]
                else:
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{address}/commit/1", "commitOid": "1", "success": True}
        self.answer(answer, self.server.refuse or 200)

    def do_GET(self) -> None:
        if self.server.refuse:  # a repository that may not be made, but is there, would do
            return self.answer({"error": "not found"}, 404)
        return self.answer({"id": "team/tuned", "sha": "0" * 40, "private": True, "siblings": [], "tags": []}, 200)

    def answer(self, value: Any, status: int) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{found.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield found
    found.shutdown()
    found.server_close()


def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("---\nlibrary_name: diffusers\n---\n# tuned\n")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(bytes(range(100)))
    return tmp_path


def test_every_file_goes_into_one_commit_of_a_private_repository(server: Hub, tmp_path: Path) -> None:
    hub.check("team/tuned")
    url = hub.push(folder(tmp_path), "team/tuned", message="rewardtune: run, step 3")
    assert url.endswith("/team/tuned")
    assert server.made["name"] == "tuned" and server.made["organization"] == "team"
    assert server.made.get("private") is True or server.made.get("visibility") == "private"
    assert server.tokens == {"Bearer hf_secret"}
    assert server.files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert server.summary == "rewardtune: run, step 3"


def test_a_refusal_is_told_in_the_hubs_words_and_the_export_stays(server: Hub, tmp_path: Path) -> None:
    server.refuse = 403
    with pytest.raises(RecipeError, match=r"--push team/tuned: .*no right to write here.*hf upload team/tuned"):
        hub.push(folder(tmp_path), "team/tuned", message="m")
    assert len(list(tmp_path.iterdir())) == 2 and not server.files


def test_a_hub_that_is_not_there(tmp_path: Path, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RecipeError, match=r"the hub did not take it \(.*The export is whole"):
        hub.push(folder(tmp_path), "team/tuned", message="m")


def test_what_cannot_succeed_is_said_before_the_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RecipeError, match=r"needs a token.*hf auth login"):
        hub.check("team/tuned")
    with pytest.raises(RecipeError, match="Write it as OWNER/NAME"):
        hub.check("team/tuned/more")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="HF_HUB_OFFLINE"):
        hub.check("team/tuned")
    from rewardtune.training.run import export_run

    with pytest.raises(RecipeError, match="HF_HUB_OFFLINE"):
        export_run(tmp_path, push="team/tuned")
