# SPDX-License-Identifier: GPL-2.0-or-later
"""The process of a call to a qube's service, as `qubesadmin.Qubes.run_service` returns it."""

import os
from tempfile import TemporaryFile
from threading import Event
from typing import IO

from bounds import BOUND_S


class FakeProcess:
    """A call's process, as `subprocess.Popen`: ``status`` is how it will end, None for never, and it says
    ``says`` before that. Its input is a pipe that nobody reads before the end.
    """

    def __init__(self, status: int | None, says: bytes) -> None:
        self._status = status
        self.is_closed = False
        self._is_over = Event()
        self._ends: list[int] = []
        self.is_killed = False
        self.given = b""
        given_fd, stdin_fd = os.pipe()
        self._given, self.stdin = os.fdopen(given_fd, "rb"), os.fdopen(stdin_fd, "wb")
        if status is None:
            stdout_fd, end = os.pipe()
            self._ends.append(end)
            os.write(end, says)
            self.stdout: IO[bytes] = os.fdopen(stdout_fd, "rb")
        else:
            self.stdout = TemporaryFile()  # noqa: SIM115  # closed at the end
            self.stdout.write(says)
            self.stdout.seek(0)
            self._is_over.set()

    def __enter__(self) -> "FakeProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True
        self.stdout.close()
        self.stdin.close()
        self.wait()
        self._given.close()

    def wait(self, timeout: float | None = None) -> int:
        assert self._is_over.wait(BOUND_S), "nobody ends it"
        if not self.given and self.stdin.closed and not self._given.closed:
            self.given = self._given.read()
        return -9 if self._status is None else self._status

    def kill(self) -> None:
        if not self._is_over.is_set():
            self.is_killed = True
            self._is_over.set()
            os.close(self._ends.pop())
