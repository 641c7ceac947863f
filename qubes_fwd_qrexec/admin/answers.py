# SPDX-License-Identifier: GPL-2.0-or-later
"""The answer of a called qube, read within bounds of size and time: it may send anything, or never end."""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from subprocess import Popen
from threading import Timer
from typing import TypeVar

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.report import REPORT_MAX_BYTES, QubeReport, ReportError
from qubes_fwd_qrexec.common.services import STATUS_SERVICE
from qubes_fwd_qrexec.common.values import QubeName

from .backend import Backend

# A trial of a forward takes up to 3 s in its qube, and a call some tenths of a second.
ANSWER_TIMEOUT_S = 8.0
# More qubes than run on one machine; the others would wait for these.
_AT_ONCE = 32

_K = TypeVar("_K")
_T = TypeVar("_T")


class AnswerError(StoreError):
    """A qube that was asked gave no answer; ``status`` is the call's exit status, if it came to that.

    ``way_out`` says what helps, if the fault is known and lies outside of the qube.
    """

    def __init__(self, text: str, status: int | None = None, *, way_out: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.way_out = way_out


class NotRunningError(AnswerError):
    """The qube is not running, so nothing lives there that a call could end."""


def read_answer(
    process: Popen[bytes], given: str, max_bytes: int, what: str, timeout_s: float | None = None
) -> bytes:
    """Give a call its input and return all that it says, which is untrusted. The call has ended then.

    ``process`` has pipes as stdin and stdout, and ``what`` names the call in errors. Raises `AnswerError`
    unless it ends with status 0, within ``timeout_s`` (else `ANSWER_TIMEOUT_S`), after at most ``max_bytes``.
    """
    timeout_s = ANSWER_TIMEOUT_S if timeout_s is None else timeout_s
    deadline = time.monotonic() + timeout_s
    if process.stdin is None or process.stdout is None:
        raise ValueError("a call's process has both pipes")
    with process:
        # It ends every wait below.
        timer = Timer(timeout_s, process.kill)
        timer.start()
        try:
            # One that ends without reading says why by its exit status.
            with suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(given.encode("ascii"))
            untrusted_answer = process.stdout.read(max_bytes + 1)
            if len(untrusted_answer) > max_bytes:
                raise AnswerError(f"{what} said more than {max_bytes} bytes")
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
    if time.monotonic() >= deadline:
        raise AnswerError(f"{what} did not end within {timeout_s:g} s")
    if status != 0:
        is_older = status == ExitStatus.BAD_ARGUMENT
        why = ", as it does not understand that; its package is older than dom0's" if is_older else ""
        raise AnswerError(f"{what} ended with exit status {status}{why}", status)
    return untrusted_answer


@contextmanager
def reading(qube: QubeName) -> Iterator[None]:
    """Raises `AnswerError` for what this qube says and cannot be read."""
    try:
        yield
    except ReportError as error:
        raise AnswerError(f"what {qube} says cannot be read: {error}") from error


def ask_status(
    backend: Backend, qube: QubeName, argument: str = "", timeout_s: float | None = None
) -> QubeReport:
    """What a qube says of itself. Raises `AnswerError`."""
    with reading(qube):
        return QubeReport.parse(
            backend.ask(qube, f"{STATUS_SERVICE}+{argument}", REPORT_MAX_BYTES, timeout_s)
        )


def both(one: Callable[[], _K], other: Callable[[], _T]) -> tuple[_K, _T]:
    """What two functions return that ask qubes, while both do."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(other)
        return one(), second.result()


def at_once(ask: Callable[[_K], _T], questions: Collection[_K]) -> dict[_K, _T]:
    """What ``ask`` returns for each. All are asked at once, by threads that end before this returns."""
    if len(questions) < 2:
        return {question: ask(question) for question in questions}
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(_AT_ONCE, len(questions))) as pool:
        return dict(zip(questions, pool.map(ask, questions), strict=True))
