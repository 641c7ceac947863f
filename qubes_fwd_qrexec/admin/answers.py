# SPDX-License-Identifier: GPL-2.0-or-later
"""What a called qube says, read with bounds on size and time: it may say anything, for ever or not at all."""

import os
import select
import time
from subprocess import TimeoutExpired
from typing import IO, Protocol

from qubes_fwd_qrexec.errors import StoreError

# A trial of a forward takes up to 3 s in its qube, and a call some tenths of a second.
ANSWER_TIMEOUT_S = 8.0
# qubes-core-qrexec libqrexec/qrexec.h: QREXEC_EXIT_REQUEST_REFUSED and QREXEC_EXIT_SERVICE_NOT_FOUND.
REFUSED = 126
NO_SERVICE = 127


class AnswerError(StoreError):
    """A qube that was asked gave no answer; ``status`` is the call's exit status, if it came to that.

    ``way_out`` is what helps, where that is known and not to be sought in the qube.
    """

    def __init__(self, text: str, status: int | None = None, *, way_out: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.way_out = way_out


class Answering(Protocol):
    """A call's process, as `subprocess.Popen`; its stdout is a pipe."""

    stdout: IO[bytes] | None

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


def read_answer(process: Answering, max_bytes: int, what: str, timeout_s: float = ANSWER_TIMEOUT_S) -> bytes:
    """All that the call says until it ends with status 0; else the call is ended and `AnswerError` raised."""
    deadline = time.monotonic() + timeout_s
    is_over = False
    try:
        untrusted_answer = _read(process, max_bytes, what, deadline, timeout_s)
        status = process.wait(max(0.0, deadline - time.monotonic()))
        is_over = True
    except TimeoutExpired as error:
        raise AnswerError(f"{what} did not end within {timeout_s:g} s") from error
    finally:
        if not is_over:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    if status != 0:
        raise AnswerError(f"{what} ended with exit status {status}", status)
    return untrusted_answer


def _read(process: Answering, max_bytes: int, what: str, deadline: float, timeout_s: float) -> bytes:
    if process.stdout is None:
        raise AnswerError(f"{what} has no output")
    fd = process.stdout.fileno()
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    received = bytearray()
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise AnswerError(f"{what} did not end within {timeout_s:g} s")
        more = os.read(fd, 65536)
        if not more:
            return bytes(received)
        received += more
        if len(received) > max_bytes:
            raise AnswerError(f"{what} said more than {max_bytes} bytes")
