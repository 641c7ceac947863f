# SPDX-License-Identifier: GPL-2.0-or-later
import socket
import threading

import pytest
import trio
from helpers import BOUND_S, no_fds_left, nobody, tcp_pair, unix_pair
from trio.testing import wait_all_tasks_blocked

from qubes_fwd_qrexec.relay.copy import Copy, CopyEnd, half_close
from qubes_fwd_qrexec.relay.thread import open_relay_thread
from qubes_fwd_qrexec.system.bugs import BugError


async def test_a_copy_is_carried_to_its_end() -> None:
    with no_fds_left():
        far_in, near_in = unix_pair()
        near_out, far_out = unix_pair()
        with far_in, near_in, near_out, far_out:
            async with open_relay_thread() as relays:
                far_in.send(b"hello")
                half_close(far_in)
                with trio.fail_after(BOUND_S):
                    assert await relays.run(Copy(near_in, near_out)) is CopyEnd.EOF
                assert far_out.recv(9) == b"hello"


async def test_a_cancelled_copy_has_let_go_of_its_sockets() -> None:
    far, near = tcp_pair()
    near_out, far_out = unix_pair()
    with far, near, near_out, far_out:
        async with open_relay_thread() as relays:
            watched = relays.loop.watched
            for _ in range(200):
                copy = Copy(near, near_out)
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(relays.run, copy)
                        await trio.lowlevel.checkpoint()
                        scope.cancel()
                assert copy.on_end is None
                assert relays.loop.watched == watched
                assert not relays.waiting


async def test_an_end_and_a_cancellation_at_once_leave_nothing_behind() -> None:
    """Whichever wins, the task's next copy is not affected."""
    async with open_relay_thread() as relays:
        for turn in range(200):
            far, near = unix_pair()
            near_out, far_out = unix_pair()
            with far, near, near_out, far_out, trio.fail_after(BOUND_S):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:

                        @nursery.start_soon
                        async def cancel(
                            far: socket.socket = far, scope: trio.CancelScope = scope, turns: int = turn % 7
                        ) -> None:
                            far.close()
                            for _ in range(turns):
                                await trio.lowlevel.checkpoint()
                            scope.cancel()

                        assert await relays.run(Copy(near, near_out)) is CopyEnd.EOF
                with trio.CancelScope(shield=True):
                    far_out.send(b"x")
                    half_close(far_out)
                    assert await relays.run(Copy(near_out, near_out_sink := near)) is not None
                    assert near_out_sink is near
        assert not relays.waiting


async def test_a_copy_that_is_cancelled_before_it_begins_never_begins() -> None:
    far, near = tcp_pair()
    with far, near:
        async with open_relay_thread() as relays:
            copy = Copy(near, near)
            with trio.CancelScope() as scope:
                scope.cancel()
                await relays.run(copy)
            assert scope.cancelled_caught
            assert copy.on_end is None


async def test_a_copy_that_cannot_start_does_not_affect_others() -> None:
    far_in, near_in = unix_pair()
    near_out, far_out = unix_pair()
    with far_in, near_in, near_out, far_out:
        async with open_relay_thread() as relays, trio.open_nursery() as nursery:
            ends: list[CopyEnd] = []

            @nursery.start_soon
            async def first() -> None:
                ends.append(await relays.run(Copy(near_in, near_out)))

            await wait_all_tasks_blocked()  # the first one was ordered, before what we order
            with trio.fail_after(BOUND_S), pytest.raises(ValueError, match="one copy"):
                await relays.run(Copy(near_in, far_in))
            assert not relays.has_failed
            nursery.cancel_scope.deadline = trio.current_time() + BOUND_S
            half_close(far_in)
        assert ends == [CopyEnd.EOF]


async def test_a_failing_thread_is_noticed_by_whoever_watches_it() -> None:
    async with open_relay_thread() as relays:
        relays.order(relays.loop.close, nobody)
        with trio.fail_after(BOUND_S), pytest.raises(RuntimeError, match="relay thread has failed"):
            await relays.watch()


async def test_a_failing_thread_fails_every_copy_and_every_later_one() -> None:
    pairs = [unix_pair() for _ in range(6)]
    failures: list[BaseException | None] = []

    async with open_relay_thread() as relays:

        async def carry(source: socket.socket, sink: socket.socket) -> None:
            try:
                await relays.run(Copy(source, sink))
            except RuntimeError as error:
                failures.append(error.__cause__)

        with trio.fail_after(BOUND_S):
            async with trio.open_nursery() as nursery:
                for (_, source), (sink, _) in zip(pairs[:3], pairs[3:], strict=True):
                    nursery.start_soon(carry, source, sink)
                await wait_all_tasks_blocked()  # all are ordered, before the failure
                relays.order(relays.loop.close, nobody)
        assert [type(failure) for failure in failures] == [ValueError] * 3  # epoll is closed
        assert relays.has_failed
        with pytest.raises(RuntimeError, match="relay thread has failed"):
            await relays.run(Copy(pairs[0][0], pairs[0][1]))
    for one, other in pairs:
        one.close()
        other.close()


@pytest.mark.usefixtures("bugs_are_wanted")
async def test_a_bug_in_an_order_reaches_only_the_task_that_gave_it() -> None:
    far_in, near_in = unix_pair()
    near_out, far_out = unix_pair()
    let_go: list[bool] = []

    def begin(_finish: object) -> None:
        raise ZeroDivisionError("a bug")

    with far_in, near_in, near_out, far_out, trio.fail_after(BOUND_S):
        async with open_relay_thread() as relays, trio.open_nursery() as nursery:
            ends: list[CopyEnd] = []

            @nursery.start_soon
            async def other() -> None:
                ends.append(await relays.run(Copy(near_in, near_out)))

            with pytest.raises(BugError, match="a bug of this program"):
                await relays.wait(begin, lambda: let_go.append(True))
            assert let_go == [True]
            ended: list[bool] = []
            relays.order(lambda: begin(None), lambda: ended.append(True))
            half_close(far_in)
        assert ends == [CopyEnd.EOF]
        assert ended == [True]
        assert relays.loop.bugs.count == 2


async def test_what_is_done_now_is_done_when_the_call_returns() -> None:
    async with open_relay_thread() as relays:
        done: list[int] = []
        for number in range(100):
            relays.order(lambda number=number: done.append(number), nobody)  # type: ignore[misc]
            assert relays.do_now(lambda number=number: done[-1] == number)  # type: ignore[misc]
        assert done == list(range(100))

        def refuse() -> None:
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            relays.do_now(refuse)
        assert not relays.has_failed
        assert relays.do_now(threading.get_ident) != threading.get_ident()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_without_the_thread_it_is_done_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A forward can be closed after a crash, too."""
    async with open_relay_thread() as relays:

        def crash(timeout_s: float | None = None) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(relays.loop, "run_once", crash)
        relays.order(lambda: None, nobody)
        with trio.fail_after(BOUND_S):
            while not relays.has_failed:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.005)
        assert relays.do_now(threading.get_ident) == threading.get_ident()
