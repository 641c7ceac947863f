# SPDX-License-Identifier: GPL-2.0-or-later
"""UNIX sockets with paths of any length."""

import os
import socket
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
