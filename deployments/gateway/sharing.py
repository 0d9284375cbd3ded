"""The listening socket: an address in, the one socket that all gateway processes of this node accept from out.

The first process binds the address and nobody else can: a port that a stranger has is an error. Each process then
hands the socket to those that come later, over a Unix socket that only this user can reach. A new gateway so takes
over while the old one still accepts, and when the old one stops, connections that wait to be accepted stay with the
socket. With SO_REUSEPORT they would be reset: every process has a queue of its own then.
"""

import errno
import hashlib
import os
import secrets
import socket
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from cluster.control.ports import listening_error
from cluster.errors import ControlError

_BACKLOG = 2048

_TAKEN_AFTER_S = 2.0
"""Longer than a process needs from binding to handing over, so that two that start together do not quarrel."""
_STUCK_AFTER_S = 10.0
_HAND_OVER_TIMEOUT_S = 2.0
_RETRY_S = 0.05
_GREETING = b"manta"


class SharedSocket:
    """``listening`` accepts HTTP connections; ``hand_over`` is readable when another process asks for it."""

    def __init__(self, listening: socket.socket, hand_over: socket.socket, path: Path) -> None:
        self.listening = listening
        self.hand_over = hand_over
        self._path = path

    def give(self) -> None:
        """Give the listening socket to one process that asked."""
        try:
            asking, _ = self.hand_over.accept()
        except BlockingIOError:
            return  # it went away again
        with asking, suppress(OSError):
            socket.send_fds(asking, [_GREETING], [self.listening.fileno()])

    def close(self) -> None:
        """Stop handing over. ``listening`` is the caller's to close."""
        self._path.unlink(missing_ok=True)
        self.hand_over.close()


def open_shared(host: str, port: int, owner: str) -> SharedSocket:
    """The socket of ``host:port`` for processes of ``owner``: that of one which is there, else a new one.

    ``owner`` names the Ray cluster: only its processes share. Blocks for up to ten seconds. Raises ControlError when
    the port is taken by anything else, or nothing can listen there.
    """
    directory = _private_directory()
    prefix = hashlib.sha256(f"{owner}|{host}|{port}".encode()).hexdigest()[:16]
    listening = _obtain(host, port, directory, prefix)
    path = directory / f"{prefix}-{secrets.token_hex(4)}.sock"
    hand_over = socket.socket(socket.AF_UNIX)
    hand_over.bind(str(path))
    hand_over.listen(16)
    hand_over.setblocking(False)
    return SharedSocket(listening, hand_over, path)


def _obtain(host: str, port: int, directory: Path, prefix: str) -> socket.socket:
    begin = time.monotonic()
    while True:
        try:
            bound = _bind(host, port)
            for path in directory.glob(f"{prefix}-*.sock"):
                path.unlink(missing_ok=True)  # nobody shares a socket that is new: left by processes that were killed
            return bound
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise listening_error(error, port, "gateway.http", host) from error
            paths = sorted(directory.glob(f"{prefix}-*.sock"))
            received = next(filter(None, map(_receive, paths)), None)
            if received is not None:
                return received
            if time.monotonic() - begin > (_STUCK_AFTER_S if paths else _TAKEN_AFTER_S):
                raise listening_error(error, port, "gateway.http", host) from error
        time.sleep(_RETRY_S)


def _bind(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening


def _receive(path: Path) -> socket.socket | None:
    """The listening socket of the process behind ``path``; None, and the path gone, when it is dead."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(_HAND_OVER_TIMEOUT_S)
        try:
            asking.connect(str(path))
            greeting, descriptors, _, _ = socket.recv_fds(asking, len(_GREETING), 1)
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return None
        except OSError:
            return None  # it stops, or is stuck; it is asked again
    if greeting != _GREETING or not descriptors:
        return None
    listening = socket.socket(fileno=descriptors[0])
    listening.setblocking(False)
    return listening


def _private_directory() -> Path:
    """Where the Unix sockets are; ControlError unless it is this user's alone."""
    directory = Path(tempfile.gettempdir()) / f"manta-gateway-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ControlError(f"{directory} must be a directory that only user {os.getuid()} can enter; remove it")
    return directory
