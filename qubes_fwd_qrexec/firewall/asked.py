# SPDX-License-Identifier: GPL-2.0-or-later
"""The socket at which root asks what is in force: who connects gets an `NftReport`, and end of file.

Nothing is read from it. The report is made after the connection, so it tells of no earlier moment.
"""

import contextlib
import socket
from pathlib import Path
from typing import Self

from qubes_fwd_qrexec.common.document import dump
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.nftreport import NftReport
from qubes_fwd_qrexec.system.unixsockets import open_unix_listening

# In the runtime directory of the unit.
ASK = "ask"
# dom0 asks once after a change; those that wait are answered together.
_WAITING_MAX = 16
# An answer mostly fits into the socket's buffer.
_PATIENCE_S = 1.0


class AskedError(ForwardError):
    """The socket cannot be made; the text says why."""


class Asked:
    """Readable when somebody asks. Raises `AskedError`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._socket = open_unix_listening(path, 0o600, _WAITING_MAX)
        except OSError as error:
            raise AskedError(f"nobody could ask what is in force: {path}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def fileno(self) -> int:
        return self._socket.fileno()

    def take(self) -> list[socket.socket]:
        """Those who have asked since the last call, to be given to `answer`."""
        taken: list[socket.socket] = []
        with contextlib.suppress(OSError):
            while len(taken) < _WAITING_MAX:
                taken.append(self._socket.accept()[0])
        return taken


def answer(taken: list[socket.socket], report: NftReport) -> None:
    """Answer all, and close their connections; whoever does not read goes without."""
    for connection in taken:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_PATIENCE_S)
            connection.sendall(dump(report.as_json()))
