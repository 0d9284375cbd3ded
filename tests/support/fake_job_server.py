"""Ray's job server as ``manta train`` sees it: packages and jobs in, their states and growing logs out."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web


class FakeJobServer:
    """Jobs run until a test ends them, or their script does: lines of their log, and the state they end in."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.packages: dict[str, bytes] = {}
        self.logs: dict[str, list[str]] = {}
        self.scripts: dict[str, tuple[list[str], str]] = {}
        self.followers = 0
        self.url = ""
        self.loses_logs = False
        """Whether a follower's connection breaks after what is there."""
        self.ends_when_lost = False
        """Whether the job succeeds once such a connection broke."""
        self._ready = threading.Event()
        self._stop = asyncio.Event()

    def end(self, submission_id: str, status: str, message: str = "") -> None:
        self.jobs[submission_id] |= {"status": status, "message": message, "end_time": 1_700_000_060_000}

    def write(self, submission_id: str, *lines: str) -> None:
        self.logs[submission_id] += [f"{line}\n" for line in lines]

    @contextmanager
    def serving(self) -> Iterator["FakeJobServer"]:
        thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        thread.start()
        assert self._ready.wait(10)
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        app = web.Application()
        app.add_routes(
            [
                web.get("/api/version", self._version),
                web.put("/api/packages/gcs/{name}", self._package),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/", self._list),
                web.get("/api/jobs/{id}", self._one),
                web.post("/api/jobs/{id}/stop", self._stop_job),
                web.get("/api/jobs/{id}/logs/tail", self._tail),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "session_name": "session"})

    async def _package(self, request: web.Request) -> web.Response:
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()

    async def _submit(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        name = body["submission_id"]
        if name in self.jobs:
            return web.Response(status=500, text=f"Job with submission_id {name} already exists")
        self.jobs[name] = body | {"status": "RUNNING", "start_time": 1_700_000_000_000, "type": "SUBMISSION"}
        self.logs[name] = []
        if name in self.scripts:
            lines, state = self.scripts[name]
            self.write(name, *lines)
            self.end(name, state)
        return web.json_response({"submission_id": name, "job_id": name})

    async def _list(self, _: web.Request) -> web.Response:
        driver = {"submission_id": None, "status": "RUNNING", "metadata": {}, "entrypoint": "", "type": "DRIVER"}
        return web.json_response([driver, *self.jobs.values()])

    async def _one(self, request: web.Request) -> web.Response:
        return web.json_response(self.jobs[request.match_info["id"]])

    async def _stop_job(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        self.write(name, "saved")
        self.end(name, "STOPPED", "Job was intentionally stopped.")
        return web.json_response({"stopped": True})

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        name = request.match_info["id"]
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.followers += 1
        num_sent = 0
        while self.jobs[name]["status"] == "RUNNING" or num_sent < len(self.logs[name]):
            lines = self.logs[name][num_sent:]
            if lines:
                await socket.send_str("".join(lines))
                num_sent += len(lines)
            elif self.loses_logs:
                if self.ends_when_lost:
                    self.end(name, "SUCCEEDED")
                break
            await asyncio.sleep(0.005)
        await socket.close()
        return socket
