# SPDX-License-Identifier: GPL-2.0-or-later
"""UNIX sockets by their path, however long that is."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# sockaddr_un.sun_path has 108 bytes, with the NUL.
SOCKET_PATH_MAX = 107


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """A UNIX socket's address that fits into 107 bytes, however long the path is."""
    if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
        yield str(path)
        return
    directory_fd = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory_fd}/{path.name}"
    finally:
        os.close(directory_fd)


def open_unix_listening(path: Path, mode: int, backlog: int) -> socket.socket:
    """A non-blocking socket that listens at ``path``, in the place of what a dead process left there.

    Raises OSError. The directory must be the caller's own.
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
