# SPDX-License-Identifier: GPL-2.0-or-later
"""What a called qube says, read with bounds on size and time: it may say anything, for ever or not at all."""

import os
import select
import time
from contextlib import suppress
from subprocess import TimeoutExpired
from typing import IO, Protocol

from qubes_fwd_qrexec.common.errors import StoreError

# A trial of a forward takes up to 3 s in its qube, and a call some tenths of a second.
ANSWER_TIMEOUT_S = 8.0
# qubes-core-qrexec libqrexec/qrexec.h: QREXEC_EXIT_REQUEST_REFUSED and QREXEC_EXIT_SERVICE_NOT_FOUND.
REFUSED = 126
NO_SERVICE = 127
# `ExitStatus.BAD_ARGUMENT` of our services.
_BAD_ARGUMENT = 2


class AnswerError(StoreError):
    """A qube that was asked gave no answer; ``status`` is the call's exit status, if it came to that.

    ``way_out`` is what helps, where that is known and not to be sought in the qube.
    """

    def __init__(self, text: str, status: int | None = None, *, way_out: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.way_out = way_out


class NotRunningError(AnswerError):
    """Nothing runs that could answer: what a call there would end does not live either."""


class Answering(Protocol):
    """A call's process, as `subprocess.Popen`; its stdout is a pipe, and its stdin if it gets anything."""

    stdin: IO[bytes] | None
    stdout: IO[bytes] | None

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


def read_answer(
    process: Answering, max_bytes: int, what: str, timeout_s: float = ANSWER_TIMEOUT_S, given: str = ""
) -> bytes:
    """All that the call says until it ends with status 0; else the call is ended and `AnswerError` raised.

    ``given`` is at most what a pipe takes at once, 64 KiB.
    """
    deadline = time.monotonic() + timeout_s
    is_over = False
    try:
        _give(process, given.encode("ascii"), what)
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
        why = ", as it does not understand that; its package is older than dom0's"
        raise AnswerError(
            f"{what} ended with exit status {status}{why if status == _BAD_ARGUMENT else ''}", status
        )
    return untrusted_answer


def _give(process: Answering, given: bytes, what: str) -> None:
    if process.stdin is None:
        return
    fd = process.stdin.fileno()
    os.set_blocking(fd, False)
    try:
        # One that has ended without reading says why by its exit status.
        with suppress(BrokenPipeError):
            if os.write(fd, given) != len(given):
                raise AnswerError(f"{what} took only a part of what it was told")
    except BlockingIOError as error:
        raise AnswerError(f"{what} took nothing of what it was told") from error
    finally:
        process.stdin.close()


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
