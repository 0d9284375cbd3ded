"""Ports of this machine: is one free, and which one is."""

import errno
import socket

import psutil

from cluster.errors import ControlError


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen on ``host:port`` now."""
    return _refusal(port, host) is None


def require_free(port: int, key: str, host: str = "127.0.0.1") -> None:
    """Raise ControlError, with the key to change and the reason, unless a server could listen on ``host:port``."""
    refusal = _refusal(port, host)
    if refusal is not None:
        raise listening_error(refusal, port, key, host)


def listening_error(refusal: OSError, port: int, key: str, host: str) -> ControlError:
    """Why nothing can listen on ``host:port``, which the config has at ``key``, and what to do."""
    if refusal.errno == errno.EADDRINUSE:
        return ControlError(
            f"{key}: port {port} on {host} is taken by {_listener(port)}; end it, or write another port there"
        )
    return ControlError(
        f"{key}: nothing can listen on port {port} of {host} here ({refusal.strerror or refusal}); "
        "write a port of 1024 or more, and an address of this machine"
    )


def _listener(port: int) -> str:
    """Who listens on ``port``, as far as this user may see it."""
    try:
        found = psutil.net_connections(kind="tcp")
        listening = [
            one for one in found if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port
        ]
        process_ids = sorted({one.pid for one in listening if one.pid is not None})
        names = [f"process {process_id} ({psutil.Process(process_id).name()})" for process_id in process_ids]
    except psutil.Error:
        names = []
    return ", ".join(names) or "another process"


def _refusal(port: int, host: str) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def unused_ports(count: int) -> list[int]:
    """``count`` different ports of the loopback address that nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
