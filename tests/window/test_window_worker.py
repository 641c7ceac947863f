# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker does its jobs in turn, and says in the main thread what came of them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from helpers import BOUND_S
from mainloop import MainLoop

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.common.errors import RefusedError, StoreError
from qubes_fwd_qrexec.window.model.worker import TRACE_VARIABLE, FaultError, Worker


@pytest.fixture
def loop() -> MainLoop:
    return MainLoop()


@pytest.fixture
def worker(loop: MainLoop) -> Iterator[Worker]:
    worker = Worker(lambda: "backend", loop.deliver)  # type: ignore[arg-type, return-value]
    yield worker
    worker.close()


class Heard:
    """What a job's owner was told."""

    def __init__(self) -> None:
        self.found: list[object] = []
        self.threads: set[int] = set()

    def __call__(self, what: object) -> None:
        self.found.append(what)
        self.threads.add(threading.get_ident())


@contextmanager
def held_up(worker: Worker) -> Iterator[None]:
    """A job that has begun and is not done before the block is left."""
    begun, may_end = threading.Event(), threading.Event()

    def hold(_: Backend) -> None:
        begun.set()
        assert may_end.wait(BOUND_S)

    worker.do(hold, lambda _: None, lambda _: None)
    assert begun.wait(BOUND_S)
    yield
    may_end.set()


def fail(error: Exception) -> object:
    raise error


def test_a_job_runs_in_the_thread_and_its_result_is_told_in_the_main_one(
    worker: Worker, loop: MainLoop
) -> None:
    heard, failed = Heard(), Heard()
    worker.do(lambda backend: (backend, threading.get_ident()), heard, failed)
    loop.until(lambda: heard.found)
    ((backend, thread),) = heard.found  # type: ignore[misc]
    assert backend == "backend"
    assert thread != threading.get_ident()
    assert heard.threads == {threading.get_ident()}
    assert failed.found == []


def test_jobs_are_done_in_their_order(worker: Worker, loop: MainLoop) -> None:
    heard = Heard()
    for number in range(5):
        worker.do(lambda _, number=number: number, heard, fail)  # type: ignore[misc]
    loop.until(lambda: len(heard.found) == 5)
    assert heard.found == [0, 1, 2, 3, 4]


def test_a_job_gives_way_to_a_later_one_of_its_kind_unless_it_has_begun(
    worker: Worker, loop: MainLoop
) -> None:
    heard = Heard()
    with held_up(worker):
        worker.do(lambda _: "old", heard, fail, kind="look")
        worker.do(lambda _: "a change", heard, fail)
        worker.do(lambda _: "another kind", heard, fail, kind="preview")
        worker.do(lambda _: "new", heard, fail, kind="look")
        worker.do(lambda _: "another change", heard, fail)
    loop.until(lambda: len(heard.found) == 4)
    assert heard.found == ["a change", "another kind", "new", "another change"]


@pytest.mark.parametrize("error", [StoreError("no"), RefusedError("never"), OSError(5, "broken")])
def test_an_error_is_told_and_the_worker_goes_on(worker: Worker, loop: MainLoop, error: Exception) -> None:
    done, failed = Heard(), Heard()
    worker.do(lambda _: fail(error), done, failed)
    worker.do(lambda _: "next", done, failed)
    loop.until(lambda: done.found)
    assert failed.found == [error]


def test_a_bug_is_told_in_a_sentence(
    worker: Worker, loop: MainLoop, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    failed = Heard()
    monkeypatch.delenv(TRACE_VARIABLE, raising=False)
    worker.do(lambda _: fail(KeyError("x")), fail, failed)  # type: ignore[arg-type]
    loop.until(lambda: failed.found)
    (error,) = failed.found
    assert isinstance(error, FaultError)
    assert str(error).startswith("this is a fault of the window itself (KeyError: 'x')")
    monkeypatch.setenv(TRACE_VARIABLE, "1")
    worker.do(lambda _: fail(KeyError("x")), fail, failed)  # type: ignore[arg-type]
    loop.until(lambda: len(failed.found) == 2)
    assert capfd.readouterr().err.count("Traceback") == 1


def test_a_system_that_cannot_be_opened_is_tried_again_by_the_next_job(loop: MainLoop) -> None:
    tries: list[int] = []

    def open_backend() -> Backend:
        tries.append(1)
        if len(tries) == 1:
            raise StoreError("qubesd is not there")
        return "backend"  # type: ignore[return-value]

    worker, done, failed = Worker(open_backend, loop.deliver), Heard(), Heard()
    worker.do(str, done, failed)
    loop.until(lambda: failed.found)
    assert list(map(str, failed.found)) == ["qubesd is not there"]
    worker.do(str, done, failed)
    worker.do(str, done, failed)
    loop.until(lambda: len(done.found) == 2)
    assert len(tries) == 2
    worker.close()


def test_closing_waits_for_the_job_that_runs_and_begins_no_other(loop: MainLoop) -> None:
    worker, heard, did = Worker(lambda: None, loop.deliver), Heard(), Heard()  # type: ignore[arg-type, return-value]
    begun, may_end, is_closed = threading.Event(), threading.Event(), threading.Event()

    def change(_: Backend) -> str:
        begun.set()
        assert may_end.wait(BOUND_S)
        did("changed")
        return "changed"

    worker.do(change, heard, fail)
    worker.do(lambda _: did("begun"), heard, fail)
    assert begun.wait(BOUND_S)
    closing = threading.Thread(target=lambda: (worker.close(), is_closed.set()))
    closing.start()
    assert not is_closed.is_set()
    may_end.set()
    closing.join(BOUND_S)
    assert is_closed.is_set()
    assert did.found == ["changed"]
    loop.take()
    assert heard.found == []


def test_the_main_thread_hears_of_the_end_of_the_job_that_ran(loop: MainLoop) -> None:
    worker, did = Worker(lambda: None, loop.deliver), Heard()  # type: ignore[arg-type, return-value]
    with held_up(worker):
        worker.do(lambda _: did("begun"), fail, fail)
        worker.close(waits=False, ended=lambda: did("ended"))
        assert did.found == []
    loop.until(lambda: did.found)
    assert did.found == ["ended"]


def test_closing_without_waiting_is_held_up_by_nothing(loop: MainLoop) -> None:
    worker = Worker(lambda: None, loop.deliver)  # type: ignore[arg-type, return-value]
    with held_up(worker):
        worker.close(waits=False)
