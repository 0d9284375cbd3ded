"""The Ray dashboard's REST API: method calls in, parsed JSON or a ControlError with Ray's own words out."""

import json
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests

from cluster.errors import ControlError

_READ_TIMEOUT_S = 30.0
_WRITE_TIMEOUT_S = 120.0
"""The first PUT starts Serve; a DELETE waits for replicas to drain."""
_METRICS_TIMEOUT_S = 10.0
_STATE_LIMIT = 10_000
"""Most entries that Ray's state API returns at once."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Dashboard:
    """A thin client of one dashboard; every call is one request, nothing is cached."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._session = requests.Session()
        if urlsplit(self.url).hostname in _LOOPBACK:
            self._session.trust_env = False  # a proxy configured in the environment cannot reach this machine
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    @classmethod
    def with_token_from_environment(cls, url: str) -> "Dashboard":
        """A client that sends RAY_AUTH_TOKEN, where that is set."""
        return cls(url, os.environ.get("RAY_AUTH_TOKEN"))

    def close(self) -> None:
        """Close idle connections; the client may be used again."""
        self._session.close()

    def is_up(self) -> bool:
        """Whether a dashboard answers here at all."""
        try:
            return self._session.get(f"{self.url}/api/version", timeout=2.0).status_code == 200
        except requests.RequestException:
            return False

    def version(self) -> dict[str, str]:
        """``version``, ``ray_version`` and ``session_name`` of the cluster."""
        found: dict[str, str] = self._json("GET", "/api/version")
        return found

    def serve_details(self) -> dict[str, Any]:
        """Ray's ServeInstanceDetails: applications, deployments, replicas, proxies, HTTP options."""
        found: dict[str, Any] = self._json("GET", "/api/serve/applications/")
        return found

    def put_applications(self, config: dict[str, Any]) -> None:
        """Declare all applications; Serve starts if it does not run. Errors of an application come later."""
        self._request("PUT", "/api/serve/applications/", timeout_s=_WRITE_TIMEOUT_S, body=config)

    def delete_applications(self, *, drain_s: float) -> None:
        """Remove every application and stop Serve; returns when that is done, which takes ``drain_s`` and some."""
        self._request("DELETE", "/api/serve/applications/", timeout_s=drain_s + _WRITE_TIMEOUT_S)

    def actors(self) -> list[dict[str, Any]]:
        """All actors, dead ones too, each with ``actor_id``, ``name``, ``state``, ``pid``, ``node_id``."""
        return list(self._json("GET", f"/api/v0/actors?detail=true&limit={_STATE_LIMIT}")["data"]["result"]["result"])

    def resident_bytes(self) -> dict[str, int]:
        """Resident memory by actor id, as agents reported it last; some seconds old, and missing for new actors."""
        actors = self._json("GET", "/logical/actors")["data"]["actors"]
        memory = {name: (actor.get("processStats") or {}).get("memoryInfo") or {} for name, actor in actors.items()}
        return {name: found["rss"] for name, found in memory.items() if "rss" in found}

    def nodes(self) -> list[dict[str, Any]]:
        """Nodes with ``node_id``, ``node_ip``, ``state`` and ``is_head_node``."""
        return list(self._json("GET", f"/api/v0/nodes?detail=true&limit={_STATE_LIMIT}")["data"]["result"]["result"])

    def placement_groups(self) -> list[dict[str, Any]]:
        """All placement groups, removed ones too, each with ``placement_group_id``, ``name`` and ``state``."""
        path = f"/api/v0/placement_groups?detail=true&limit={_STATE_LIMIT}"
        return list(self._json("GET", path)["data"]["result"]["result"])

    def metrics(self) -> str:
        """What the nodes' agents export for Prometheus, as text; an agent that cannot be reached is left out."""
        groups = self._json("GET", "/api/prometheus/sd")
        texts = []
        for target in sorted({target for group in groups for target in group["targets"]}):
            try:
                texts.append(self._session.get(f"http://{target}/metrics", timeout=_METRICS_TIMEOUT_S).text)
            except requests.RequestException:
                continue
        return "".join(texts)

    def jobs(self) -> list[dict[str, Any]]:
        """Jobs, ended ones too, each with ``submission_id``, ``status``, ``metadata``, and times in milliseconds."""
        return list(self._json("GET", "/api/jobs/"))

    def job(self, submission_id: str) -> dict[str, Any]:
        """One submitted job."""
        found: dict[str, Any] = self._json("GET", f"/api/jobs/{submission_id}")
        return found

    def put_package(self, name: str, content: bytes) -> None:
        """Keep an archive in the cluster, as ``gcs://<name>``, for runtime environments to unpack."""
        self._send("PUT", f"/api/packages/gcs/{name}", content, {}, _WRITE_TIMEOUT_S)

    def submit_job(self, body: dict[str, Any]) -> None:
        """Start a job; ``body`` has ``entrypoint``, ``submission_id``, ``runtime_env`` and ``metadata``."""
        self._request("POST", "/api/jobs/", timeout_s=_WRITE_TIMEOUT_S, body=body)

    def stop_job(self, submission_id: str) -> None:
        """Tell a job to end; returns before it has."""
        self._request("POST", f"/api/jobs/{submission_id}/stop")

    async def tail_job(self, submission_id: str) -> AsyncIterator[str]:
        """The lines of a job's log, from the first on, as they come; ends when the job has ended."""
        rest = ""
        url = f"{self.url}/api/jobs/{submission_id}/logs/tail"
        headers = {name: str(value) for name, value in self._session.headers.items() if name == "Authorization"}
        try:
            async with (
                aiohttp.ClientSession(headers=headers, trust_env=self._session.trust_env) as session,
                session.ws_connect(url, max_msg_size=0) as socket,
            ):
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        *whole, rest = (rest + message.data).split("\n")
                        for line in whole:
                            yield line
        except aiohttp.ClientError as error:
            raise ControlError(f"{self.url} stopped sending the log of {submission_id}: {error}") from error
        if rest:
            yield rest

    def read_log(self, file: dict[str, str], num_lines: int) -> str:
        """The last ``num_lines`` lines of a log, as the agent of its node reads it.

        ``file`` says which: ``node_id`` and ``filename``, or ``actor_id`` and ``suffix`` (``out`` or ``err``).
        """
        return self._request("GET", "/api/v0/logs/file", query=file | {"lines": str(num_lines)}).text

    def follow_log(self, file: dict[str, str], num_lines: int) -> Iterator[bytes]:
        """The last lines of a log and then what is added to it, until the caller stops iterating."""
        query = file | {"lines": str(num_lines), "interval": "0.5"}
        url = f"{self.url}/api/v0/logs/stream"
        try:
            with self._session.get(url, params=query, stream=True, timeout=(5.0, None)) as response:
                _check(response, self.url)
                yield from response.iter_content(chunk_size=None)
        except requests.RequestException as error:
            raise ControlError(f"{self.url} stopped sending a log: {error}") from error

    def _json(self, method: str, path: str) -> Any:
        response = self._request(method, path)
        try:
            return response.json()
        except requests.JSONDecodeError as error:
            raise ControlError(
                f"{self.url}{path} did not answer with JSON; is this the address of a Ray dashboard?"
            ) from error

    def _request(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float = _READ_TIMEOUT_S,
        query: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
    ) -> requests.Response:
        data = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        return self._send(method, path, data, headers, timeout_s, query)

    def _send(
        self,
        method: str,
        path: str,
        data: bytes | None,
        headers: dict[str, str],
        timeout_s: float,
        query: dict[str, str] | None = None,
    ) -> requests.Response:
        try:
            response = self._session.request(
                method, f"{self.url}{path}", params=query, data=data, headers=headers, timeout=(5.0, timeout_s)
            )
        except requests.Timeout as error:
            raise ControlError(
                f"{self.url} did not answer {method} {path} within {timeout_s:g} s; see the dashboard's logs"
            ) from error
        except requests.RequestException as error:
            raise ControlError(
                f"no Ray dashboard answers at {self.url} ({_reason(error)}); is the cluster running?"
            ) from error
        _check(response, self.url)
        return response


def _check(response: requests.Response, url: str) -> None:
    if response.ok:
        return
    if response.status_code in (401, 403):
        what = "wants a token" if response.status_code == 401 else "refuses the token"
        raise ControlError(f"{url} {what}; set RAY_AUTH_TOKEN to the token of that cluster")
    text = response.text.strip()[-2000:]
    raise ControlError(f"{url} answered {response.status_code} to {response.request.method}: {text}")


def _reason(error: requests.RequestException) -> str:
    cause: BaseException = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__ or cause
    return str(cause) or type(cause).__name__
