"""hf:// against a hub of a few lines on this machine: what is downloaded, what is refused, what a failure says."""

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

from cluster.registry.store import Registry
from tests.support.tiny_checkpoint import write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import json, sys
from cluster.errors import SourceError
from cluster.registry.sources.importer import import_source
from cluster.registry.store import Registry
try:
    version = import_source(Registry(sys.argv[1]), "tiny", sys.argv[2], task="generate", dtype="float32")
except SourceError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({"version": version.version, "source": version.source}))
"""


class Hub(ThreadingHTTPServer):
    """Serves one repository, ``org/tiny``, in the hub's protocol; ``fetched`` lists the files it gave out."""

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*")}
        self.fetched: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/tiny/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                for name, data in self.server.files.items()
            ]
            self._send(json.dumps(listed).encode(), with_body=with_body)
        elif path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.server.files.items()]
            body = {
                "id": "org/tiny",
                "modelId": "org/tiny",
                "sha": COMMIT,
                "private": False,
                "siblings": siblings,
                "tags": [],
            }
            self._send(json.dumps(body).encode(), with_body=with_body)
        elif path.startswith("/org/tiny/resolve/"):
            name = path.split("/", 5)[5]
            if with_body:
                self.server.fetched.append(name)
            self._send(self.server.files[name], with_body=with_body)
        else:
            self.send_error(404)

    def _send(self, data: bytes, *, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def serve() -> Iterator[Any]:
    hubs: list[tuple[Hub, threading.Thread]] = []

    def start(directory: Path) -> Hub:
        hub = Hub(directory)
        thread = threading.Thread(target=hub.serve_forever, args=(0.02,))
        thread.start()
        hubs.append((hub, thread))
        return hub

    yield start
    for hub, thread in hubs:
        hub.shutdown()
        thread.join()
        hub.server_close()


def _import(tmp_path: Path, endpoint: str, source: str, **environment: str) -> dict[str, str]:
    """What an import in a process of its own says: the hub library reads its settings when it is first imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "storage"), source]
    finished = subprocess.run(
        command, env=inherited | settings | environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_repository_is_downloaded_without_pickles(tmp_path: Path, serve: Any) -> None:
    directory = write_checkpoint(tmp_path / "m")
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    (directory / "modeling.py").write_text("raise SystemExit")
    hub = serve(directory)
    told = _import(tmp_path, f"http://127.0.0.1:{hub.server_port}", "hf://org/tiny")
    assert told == {"version": "v1", "source": "hf://org/tiny@main"}
    assert sorted(hub.fetched) == ["config.json", "model.safetensors", "tokenizer_config.json"]
    version = Registry(str(tmp_path / "storage")).resolve("tiny")
    assert [entry.path for entry in version.files] == sorted(hub.fetched)


def test_repository_with_pickles_alone_is_refused_by_name(tmp_path: Path, serve: Any) -> None:
    directory = write_checkpoint(tmp_path / "m")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    hub = serve(directory)
    told = _import(tmp_path, f"http://127.0.0.1:{hub.server_port}", "hf://org/tiny@main")
    assert "its pickle files (pytorch_model.bin) are refused" in told["error"]
    assert "pytorch_model.bin" not in hub.fetched


def test_failed_download_says_what_to_do(tmp_path: Path) -> None:
    told = _import(tmp_path, "http://127.0.0.1:9", "hf://org/tiny@v2", HF_HUB_OFFLINE="1")
    assert told["error"].startswith("hf://org/tiny@v2 could not be downloaded: ")
    for remedy in ("path:///", "HF_HOME", "HF_ENDPOINT", "HF_TOKEN"):
        assert remedy in told["error"]
