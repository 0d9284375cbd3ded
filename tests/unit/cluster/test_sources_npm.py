"""npm packages: the grammar of their sources, downloads without the npm client, safe unpacking."""

import base64
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic_core import PydanticCustomError

from cluster.config.sources import NpmSource, PathSource, parse_data_source, parse_source
from cluster.errors import SourceError
from cluster.registry.progress import no_progress
from cluster.registry.sources.npm import download_npm, extract_npm, registry_url

SOURCE = NpmSource(package="@scope/data", version="1.2.3", path="texts")


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("npm://@scope/data@1.2.3/texts/", SOURCE),
        ("npm://plain@0.1.0-rc.1/a/b.txt", NpmSource(package="plain", version="0.1.0-rc.1", path="a/b.txt")),
        ("path:///data/x", PathSource(path="/data/x")),
    ],
)
def test_data_sources_are_read_and_written(text: str, source: NpmSource | PathSource) -> None:
    assert parse_data_source(text) == source
    assert parse_data_source(str(source)) == source


@pytest.mark.parametrize(
    "text", ["npm://data/texts", "npm://data@1.2.3", "npm://data@latest/x", "npm://data@1.2.3/../x", "registry://a@b"]
)
def test_other_texts_are_no_data_sources(text: str) -> None:
    with pytest.raises(PydanticCustomError):
        parse_data_source(text)


def test_models_do_not_come_from_npm() -> None:
    with pytest.raises(PydanticCustomError, match="not a scheme of model sources"):
        parse_source("npm://data@1.2.3/x")


def tarball(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("package/texts/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return buffer.getvalue()


PACKED = tarball({"package/package.json": b"{}", "package/texts/a.txt": b"one", "package/textsuite/b.txt": b"two"})


@contextmanager
def registry(integrity: str) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = f"http://127.0.0.1:{self.server.server_address[1]}"
            if self.path == "/@scope%2Fdata/1.2.3":
                body = json.dumps({"dist": {"tarball": f"{url}/t.tgz", "integrity": integrity}}).encode()
            else:
                body = PACKED if self.path == "/t.tgz" else b""
            self.send_response(200 if body else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def without_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.usefixtures("without_npm")
def test_a_package_is_downloaded_once_and_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(PACKED).digest()).decode()
    pinned = hashlib.sha256(PACKED).hexdigest()
    with registry(integrity) as url:
        monkeypatch.setenv("npm_config_registry", url)
        arguments = {"incoming": tmp_path / "incoming", "sha256": pinned, "progress": no_progress}
        archive = download_npm(SOURCE, tmp_path / "downloads", **arguments)  # type: ignore[arg-type]
    assert archive.name == "scope-data-1.2.3.tgz"
    again = download_npm(SOURCE, tmp_path / "downloads", **arguments)  # type: ignore[arg-type]
    assert again == archive, "the registry is gone, the archive is not"
    found = extract_npm(archive, "texts", tmp_path / "out", no_progress)
    assert [path.name for path in found.iterdir()] == ["a.txt"]
    with pytest.raises(SourceError, match=r"has no 'nothing'; it has package\.json, texts, textsuite"):
        extract_npm(archive, "nothing", tmp_path / "out", no_progress)


@pytest.mark.usefixtures("without_npm")
def test_other_bytes_than_stated_or_pinned_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with registry("sha512-" + "A" * 86 + "==") as url:
        monkeypatch.setenv("npm_config_registry", url)
        with pytest.raises(SourceError, match="but the registry states sha512-AAA"):
            download_npm(SOURCE, tmp_path / "d", incoming=tmp_path / "a", sha256=None, progress=no_progress)
    with registry("") as url:
        monkeypatch.setenv("npm_config_registry", url)
        with pytest.raises(SourceError, match="is pinned"):
            download_npm(SOURCE, tmp_path / "d", incoming=tmp_path / "b", sha256="0" * 64, progress=no_progress)
        other = NpmSource(package="gone", version="1.0.0", path="x")
        with pytest.raises(SourceError, match=r"npm://gone@1\.0\.0/x could not be downloaded"):
            download_npm(other, tmp_path / "d", incoming=tmp_path / "c", sha256=None, progress=no_progress)
    assert not (tmp_path / "d").exists()


def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "evil.tgz"
    archive.write_bytes(tarball({"package/../../texts/a.txt": b"x"}))
    with pytest.raises(SourceError, match="would leave the folder"):
        extract_npm(archive, "texts", tmp_path / "out", no_progress)


def test_npms_own_configuration_names_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("npm_config_registry", raising=False)
    with pytest.raises(SourceError, match="needs the npm client, which is not in PATH"):
        registry_url()
    (tmp_path / ".npmrc").write_text("; comment\n@scope:registry=http://other\nregistry = http://mirror/npm/\n")
    assert registry_url() == "http://mirror/npm"
    monkeypatch.setenv("npm_config_registry", "http://first")
    assert registry_url() == "http://first"
