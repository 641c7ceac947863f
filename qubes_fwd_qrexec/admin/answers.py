# SPDX-License-Identifier: GPL-2.0-or-later
"""The answer of a called qube, read within limits of size and time: it may send anything, or never end."""

import os
import select
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from subprocess import Popen, TimeoutExpired
from threading import Lock, local
from typing import IO, TypeVar

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.report import REPORT_MAX_BYTES, QubeReport, ReportError
from qubes_fwd_qrexec.common.services import STATUS_SERVICE
from qubes_fwd_qrexec.common.values import QubeName

from .backend import Backend

# A trial of a forward takes up to 3 s in its qube, and a call some tenths of a second.
ANSWER_TIMEOUT_S = 8.0
_READ_BYTES = 1 << 16
# docs/facts.md, Q5: of qrexec calls that begin together some fail from about ten on.
CALLS_AT_ONCE = 8

_K = TypeVar("_K")
_T = TypeVar("_T")


class AnswerError(StoreError):
    """A qube that was asked gave no answer.

    ``status`` is the call's exit status, if the call got that far. ``way_out`` says what helps, if the cause
    is known and lies outside of the qube.
    """

    def __init__(self, text: str, status: int | None = None, *, way_out: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.way_out = way_out


class NotRunningError(AnswerError):
    """The qube is not running, so it has no calls that could be ended."""


def read_answer(
    process: Popen[bytes], given: str, max_bytes: int, what: str, timeout_s: float | None = None
) -> bytes:
    """Give a call its input and return all of its output, which is untrusted; the call has then ended.

    ``process`` has pipes as stdin and stdout, and ``what`` names the call in errors. Raises `AnswerError`
    unless the call ends with status 0, within ``timeout_s`` (default `ANSWER_TIMEOUT_S`), after at most
    ``max_bytes``.
    """
    timeout_s = ANSWER_TIMEOUT_S if timeout_s is None else timeout_s
    deadline = time.monotonic() + timeout_s
    if process.stdin is None or process.stdout is None:
        raise ValueError("a call's process has both pipes")
    with process:
        try:
            untrusted_answer = _exchange(
                process.stdin, process.stdout, given.encode("ascii"), max_bytes + 1, deadline
            )
            if len(untrusted_answer) > max_bytes:
                raise AnswerError(f"{what} said more than {max_bytes} bytes")
            with waiting():
                status = process.wait(max(0.0, deadline - time.monotonic()))
        except (TimeoutError, TimeoutExpired):
            raise AnswerError(f"{what} did not end within {timeout_s:g} s") from None
        finally:
            process.kill()
    if status != 0:
        is_older = status == ExitStatus.BAD_ARGUMENT
        older = ", because it does not understand the request: its package is older than dom0's"
        why = older if is_older else ""
        raise AnswerError(f"{what} ended with exit status {status}{why}", status)
    return untrusted_answer


def _exchange(stdin: IO[bytes], stdout: IO[bytes], given: bytes, max_bytes: int, deadline: float) -> bytes:
    """The output up to its end, or its first ``max_bytes``; the call may read its input or not. Raises
    `TimeoutError`.
    """
    left, untrusted_said, is_over = memoryview(given), bytearray(), False
    os.set_blocking(stdin.fileno(), False)
    ends = select.poll()
    ends.register(stdin, select.POLLOUT)
    ends.register(stdout, select.POLLIN)
    while not (is_over and stdin.closed):
        left_s = deadline - time.monotonic()
        with waiting():
            ready = ends.poll(1000 * left_s) if left_s > 0 else []
        if not ready:
            raise TimeoutError
        for fd, _ in ready:
            if fd == stdout.fileno():
                data = os.read(fd, min(_READ_BYTES, max_bytes - len(untrusted_said)))
                untrusted_said += data
                if len(untrusted_said) >= max_bytes:
                    return bytes(untrusted_said)
                if is_over := not data:
                    ends.unregister(fd)
            else:
                left = left[_written(fd, left) :]
                if not left:
                    ends.unregister(fd)
                    stdin.close()
    return bytes(untrusted_said)


def _written(fd: int, data: memoryview) -> int:
    """How many bytes need not be written any more: a call that ends without reading gives the reason by its
    exit status.
    """
    try:
        return os.write(fd, data)
    except BrokenPipeError:
        return len(data)


@contextmanager
def reading(qube: QubeName) -> Iterator[None]:
    """Turns errors in the answer of this qube into `AnswerError`."""
    try:
        yield
    except ReportError as error:
        raise AnswerError(f"the answer of {qube} cannot be read: {error}") from error


def ask_status(
    backend: Backend, qube: QubeName, argument: str = "", timeout_s: float | None = None
) -> QubeReport:
    """What a qube reports about itself. Raises `AnswerError`."""
    with reading(qube):
        return QubeReport.parse(
            backend.ask(qube, f"{STATUS_SERVICE}+{argument}", REPORT_MAX_BYTES, timeout_s)
        )


def both(one: Callable[[], _K], other: Callable[[], _T]) -> tuple[_K, _T]:
    """The results of two functions that ask qubes, run at the same time."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(other)
        return one(), second.result()


def at_once(ask: Callable[[_K], _T], questions: Collection[_K]) -> dict[_K, _T]:
    """What ``ask`` returns for each, called in threads that end before this returns.

    While one of them is `waiting`, the next is asked. Otherwise only one runs at a time: threads that compete
    for Python's lock would hold up the main loop of a window, which gives it up in each call of GTK.
    """
    if len(questions) < 2:
        return {question: ask(question) for question in questions}
    from concurrent.futures import ThreadPoolExecutor

    lock = Lock()

    def asked(question: _K) -> _T:
        with lock:
            _thread.lock = lock
            return ask(question)

    with ThreadPoolExecutor(min(CALLS_AT_ONCE, len(questions))) as pool:
        return dict(zip(questions, pool.map(asked, questions), strict=True))


class _Thread(local):
    """The lock that a thread of `at_once` holds, except while it is `waiting`."""

    lock: "Lock | None" = None  # Python 3.11 has no such type, but a function


_thread = _Thread()


@contextmanager
def waiting() -> Iterator[None]:
    """The context in which a query waits for others, so that the next qube can be asked meanwhile."""
    if (lock := _thread.lock) is None:
        yield
        return
    lock.release()
    try:
        yield
    finally:
        lock.acquire()
