# SPDX-License-Identifier: GPL-2.0-or-later
"""UNIX sockets with paths of any length."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# sockaddr_un.sun_path has 108 bytes, with the NUL.
SOCKET_PATH_MAX = 107


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """For the block, an address of at most 107 bytes for a path of any length. Raises OSError."""
    if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
        yield str(path)
        return
    directory_fd = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory_fd}/{path.name}"
    finally:
        os.close(directory_fd)


def ask(path: Path, request: bytes, timeout_s: float, max_bytes: int) -> bytes:
    """Send a request, and return everything that is said until the other end closes.

    Raises OSError, also if that takes longer or is more.
    """
    deadline_s = time.monotonic() + timeout_s
    received = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        with socket_address(path) as address:
            sock.connect(address)
        if request:  # without one the answer comes at once, and the other end may be closed already
            sock.sendall(request)
        while len(received) <= max_bytes:
            if not (more := sock.recv(1 << 16)):
                return bytes(received)
            received += more
            sock.settimeout(max(0.001, deadline_s - time.monotonic()))
    raise OSError("it does not end")


def open_unix_listening(path: Path, mode: int, backlog: int) -> socket.socket:
    """Return a non-blocking socket that listens at ``path``, replacing what a dead process left there.

    Raises OSError. Only the caller may be able to write to the directory.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        path.unlink(missing_ok=True)
        with socket_address(path) as address:
            sock.bind(address)
        path.chmod(mode)
        sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    return sock
