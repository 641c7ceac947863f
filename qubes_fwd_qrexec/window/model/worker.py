# SPDX-License-Identifier: GPL-2.0-or-later
"""A thread that does what takes time, one job after another, so that the main loop never waits.

It has a backend of its own, since what qubesadmin remembers is not meant for several threads.
"""

import os
import traceback
from collections.abc import Callable
from threading import Condition, Thread
from typing import Any, Generic, NamedTuple, TypeVar

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.common.errors import ForwardError

T = TypeVar("T")
Deliver = Callable[[Callable[[], None]], None]
"""Has the main thread call a function soon; may be called by any thread."""
OpenBackend = Callable[[], Backend]
"""Opens the system that is worked on. Raises `ForwardError`."""
TRACE_VARIABLE = "QVM_FORWARD_TRACE"


class FaultError(Exception):
    """A bug of ours; its text is for users."""


class _Job(NamedTuple, Generic[T]):
    run: Callable[[Backend], T]
    done: Callable[[T], None]
    failed: Callable[[Exception], None]
    kind: str


class Worker:
    """Does jobs in the order in which they were given."""

    def __init__(self, open_backend: OpenBackend, deliver: Deliver) -> None:
        self._open_backend = open_backend
        self._deliver = deliver
        self._jobs: list[_Job[Any]] = []
        self._has_news = Condition()
        self._is_closed = False
        self._ended: Callable[[], None] = lambda: None
        # A call that hangs keeps no program from ending: what must end well is waited for by `close`.
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def do(
        self,
        job: Callable[[Backend], T],
        done: Callable[[T], None],
        failed: Callable[[Exception], None],
        *,
        kind: str = "",
    ) -> None:
        """Run ``job`` in the thread, and then in the main one ``done`` with what it returns, or ``failed``
        with its `ForwardError`, `OSError` or a `FaultError`.

        A job of the same ``kind`` that has not begun gives way, and nobody hears of it; those without a kind
        never do.
        """
        with self._has_news:
            self._jobs = [other for other in self._jobs if not kind or other.kind != kind]
            self._jobs.append(_Job(job, done, failed, kind))
            self._has_news.notify()

    def close(self, *, waits: bool = True, ended: Callable[[], None] = lambda: None) -> None:
        """Begin no further job, and tell nobody of the one that runs; if it ``waits``, until that is done.
        Then the main thread calls ``ended``.
        """
        with self._has_news:
            self._is_closed, self._ended = True, ended
            self._has_news.notify()
        if waits:
            self._thread.join()

    def _work(self) -> None:
        backend: Backend | None = None
        while True:
            with self._has_news:
                self._has_news.wait_for(lambda: self._jobs or self._is_closed)
                if self._is_closed:
                    self._deliver(self._ended)
                    return
                job = self._jobs.pop(0)
            try:
                backend = backend or self._open_backend()
                self._tell(job.done, job.run(backend))
            except (ForwardError, OSError) as error:
                self._tell(job.failed, error)
            except Exception as error:  # noqa: BLE001  # the last place that can say so
                self._tell(job.failed, fault(error))

    def _tell(self, whom: Callable[[T], None], what: T) -> None:
        self._deliver(lambda: None if self._is_closed else whom(what))


def fault(error: Exception) -> FaultError:
    """What to tell users of a bug of ours; QVM_FORWARD_TRACE=1 has its traceback on stderr."""
    if os.environ.get(TRACE_VARIABLE):
        traceback.print_exception(error)
    words = " ".join(str(error).split())
    text = f"{type(error).__name__}{f': {words}' if words else ''}"
    return FaultError(f"this is a fault of the window itself ({text}); {TRACE_VARIABLE}=1 shows where it is")
