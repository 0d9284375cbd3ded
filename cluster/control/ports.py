"""Ports of this machine: is one free, and which one is."""

import socket

from cluster.errors import ControlError


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen on ``host:port`` now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def require_free(port: int, key: str, host: str = "127.0.0.1") -> None:
    """Raise ControlError, naming the port and the config key to change, unless ``host:port`` is free."""
    if not is_free(port, host):
        raise ControlError(f"{key}: port {port} on {host} is taken by another process; write another port there")


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
