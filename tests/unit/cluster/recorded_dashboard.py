"""A tiny HTTP server on the loopback address that answers with recorded JSON, and a Dashboard client of it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from cluster.control.dashboard import Dashboard

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> Any:
    """One recorded answer of Ray 2.60."""
    return json.loads((RECORDED / name).read_text())


class RecordedDashboard:
    """Answers per path, in turn; the last one goes on. A name ending in .json is a recording, other text is text."""

    def __init__(self, answers: dict[str, list[Any]], *, token: str | None = None, status: int = 200) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        self.answers = {path: list(items) for path, items in answers.items()}
        self.token = token
        self.status = status
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._client: Dashboard | None = None

    def __enter__(self) -> Dashboard:
        self._thread.start()
        self._client = Dashboard(self.url, self.token)
        return self._client

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        if self._client is not None:
            self._client.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                path = urlsplit(self.path).path
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                owner.requests.append((self.command, self.path, json.loads(body) if body else None))
                items = owner.answers.get(path, [""])
                item = items.pop(0) if len(items) > 1 else items[0]
                if isinstance(item, str) and item.endswith(".json"):
                    item = recorded(item)
                data = (item if isinstance(item, str) else json.dumps(item)).encode()
                self.send_response(owner.status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_DELETE = do_POST = answer  # noqa: N815

            def log_message(self, *args: object) -> None:
                """Keep the test's output quiet."""

        return Handler
