# SPDX-License-Identifier: GPL-2.0-or-later
import math
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from endings import pattern
from fakeclient import FakeClient
from handclock import HandClock
from helpers import BOUND_S, accept_socket, free_port, no_fds_left, nobody, port_of, tcp_pair

from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.exposed import call
from qubes_fwd_qrexec.exposed.call import Caller, CallTimeouts, Ending, relay_over_call
from qubes_fwd_qrexec.exposed.callbudget import CallBudget
from qubes_fwd_qrexec.exposed.callqueue import Kind
from qubes_fwd_qrexec.exposed.callwaits import CallWaits
from qubes_fwd_qrexec.relay import copy
from qubes_fwd_qrexec.relay.copy import Relay, abort, half_close
from qubes_fwd_qrexec.relay.thread import RelayThread, open_relay_thread


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    return HandClock(monkeypatch, call, copy)


class Relayed:
    """A client's socket, and how its connection over a call ended."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.ending: Ending
        self.refused: RefusedError | None = None
        self.ended = trio.Event()
        self.relays: RelayThread

    async def note(self) -> None:
        """Wait until the relay's thread has noted what it has moved, which others may have before.

        Else time that passes now could pass before that.
        """
        is_noted = trio.Event()
        self.relays.order(lambda: self.relays.tell(is_noted.set), nobody)
        with trio.fail_after(BOUND_S):
            await is_noted.wait()

    async def end(self) -> Ending:
        with trio.fail_after(BOUND_S):
            await self.ended.wait()
        if self.refused is not None:
            raise self.refused
        return self.ending


@asynccontextmanager
async def relayed(
    command: tuple[str, ...],
    port: int,
    *,
    call_s: float = 60,
    half_close_s: float = 600,
    idle_s: float = 3600,
    ends_with_server: bool = False,
    is_beside_another: bool = False,
    waits: CallWaits | None = None,
) -> AsyncIterator[Relayed]:
    client, accepted = tcp_pair()
    timeouts = CallTimeouts(call_s, half_close_s, idle_s)
    with client, accepted:
        run = Relayed(client)
        async with open_relay_thread() as relays, trio.open_nursery() as nursery, AsyncExitStack() as stack:
            run.relays = relays
            budget = CallBudget(nursery, waits=waits)
            caller = Caller(command, "work", f"s+{port}", budget, ends_with_server=ends_with_server)
            if is_beside_another:
                place = await stack.enter_async_context(budget.place(Kind.SINGLE, "work", "another"))
                place.through()

            @nursery.start_soon
            async def carry() -> None:
                try:
                    run.ending = await relay_over_call(accepted, caller, relays, timeouts)
                except RefusedError as error:
                    run.refused = error
                run.ended.set()

            yield run
            nursery.cancel_scope.cancel()
        assert not relays.waiting


async def receive(sock: socket.socket) -> bytes:
    with trio.fail_after(BOUND_S):
        await trio.lowlevel.wait_readable(sock)
    return sock.recv(65536)


async def test_a_clean_conversation_ends_without_error(tmp_path: Path, server: socket.socket) -> None:
    with no_fds_left():
        async with relayed(FakeClient(tmp_path, "serve").command, port_of(server)) as run:
            run.client.send(b"question")
            with await accept_socket(server) as far:
                assert await receive(far) == b"question"
                far.send(b"answer")
                half_close(far)
                assert await receive(run.client) == b"answer"
                assert await receive(run.client) == b""
                half_close(run.client)
                assert await receive(far) == b""
            assert await run.end() == Ending(None, 8, 6)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("exit126", "policy refuses"),
        ("exit127", "does not have the service"),
        ("exit1", "no room for another vchan"),
        ("exit125", "cannot be reached"),
        ("exit3", "exit status 3"),
        ("serve", "refused the connection"),
        ("stock", "nothing listens"),
    ],
)
async def test_a_failed_call_is_an_error_with_words_of_its_own(tmp_path: Path, mode: str, words: str) -> None:
    async with relayed(FakeClient(tmp_path, mode).command, free_port()) as run:
        ending = await run.end()
        assert ending.error is not None
        assert words in ending.error
        assert ending.received_bytes == 0


async def test_a_refusal_after_bytes_is_a_forgery(tmp_path: Path) -> None:
    async with relayed(FakeClient(tmp_path, "forge").command, 1) as run:
        ending = await run.end()
        assert ending.error is not None
        assert ending.refusal is None


async def test_a_client_program_that_dies_in_mid_stream_is_an_abort(tmp_path: Path) -> None:
    async with relayed(FakeClient(tmp_path, "die").command, 1) as run:
        assert await receive(run.client) == b"half of it"
        run.client.send(b"x")
        ending = await run.end()
        assert ending.error == "the call ended with exit status -9"


async def test_a_target_that_stays_full_is_not_waited_for_without_end(tmp_path: Path) -> None:
    waits, client = CallWaits(wait_s=1.0, again_s=0.0, doubt_s=math.inf), FakeClient(tmp_path, "exit126")
    async with relayed(client.command, 1, is_beside_another=True, waits=waits) as run:
        with pytest.raises(RefusedError, match="work takes no more than 1 calls of this qube"):
            await run.end()


async def test_a_call_that_hangs_meets_its_deadline(tmp_path: Path) -> None:
    async with relayed(FakeClient(tmp_path, "hang").command, 1, call_s=0.1) as run:
        run.client.send(pattern(1000))
        ending = await run.end()
        assert ending.error == "the call was not through to work within 0.1 s"


async def test_a_quiet_server_is_no_hanging_call(
    tmp_path: Path, server: socket.socket, clock: HandClock
) -> None:
    async with relayed(FakeClient(tmp_path, "serve").command, port_of(server), call_s=60) as run:
        run.client.send(b"x")
        with await accept_socket(server) as far:
            assert await receive(far) == b"x"
            await run.note()
            await clock.advance(120)
            assert not run.ended.is_set()


async def test_a_server_abort_is_an_error_and_says_so(tmp_path: Path, server: socket.socket) -> None:
    async with relayed(FakeClient(tmp_path, "serve").command, port_of(server)) as run:
        run.client.send(b"x")
        far = await accept_socket(server)
        assert await receive(far) == b"x"
        abort(far)
        ending = await run.end()
        assert ending.error is not None
        assert "aborted the connection" in ending.error


async def test_an_abort_that_comes_late_is_an_error_all_the_same(tmp_path: Path) -> None:
    """The FIN is out, since the status was not there in time; the log and the close still tell."""
    async with relayed(FakeClient(tmp_path, "late").command, 1) as run:
        assert await receive(run.client) == b"x"
        assert await receive(run.client) == b""
        half_close(run.client)
        ending = await run.end()
        assert ending.error is not None
        assert "aborted the connection" in ending.error


@pytest.mark.parametrize("who", ["the stock service", "the client has ended too"])
async def test_where_a_status_must_follow_a_late_one_is_waited_for(tmp_path: Path, who: str) -> None:
    """And the client sees no end of file of an answer that broke off."""
    stock = who == "the stock service"
    async with relayed(FakeClient(tmp_path, "later").command, 1, ends_with_server=stock) as run:
        if not stock:
            half_close(run.client)
        ending = await run.end()
        assert ending.error is not None
        assert "aborted the connection" in ending.error
        assert await receive(run.client) == b"x"
        with pytest.raises(BlockingIOError):  # nothing else came, and whoever has the socket aborts it
            run.client.recv(1)


async def test_a_client_abort_ends_the_call(tmp_path: Path, server: socket.socket) -> None:
    async with relayed(FakeClient(tmp_path, "serve").command, port_of(server)) as run:
        run.client.send(b"x")
        with await accept_socket(server) as far:
            assert await receive(far) == b"x"
            abort(run.client)
            assert (await run.end()).error == "the client aborted the connection"
            with pytest.raises(ConnectionResetError):
                await receive(far)


async def test_a_client_abort_against_a_sending_server_ends_the_call(
    tmp_path: Path, server: socket.socket
) -> None:
    async with relayed(FakeClient(tmp_path, "serve").command, port_of(server)) as run:
        with await accept_socket(server) as far:
            far.send(bytes(100_000))
            await receive(run.client)
            abort(run.client)
            assert (await run.end()).error == "the client aborted the connection"


@pytest.mark.parametrize("first", ["client", "server"])
async def test_a_half_closed_connection_ends_by_its_timer_alone(
    tmp_path: Path, server: socket.socket, clock: HandClock, first: str
) -> None:
    command = FakeClient(tmp_path, "serve").command
    async with relayed(command, port_of(server), half_close_s=600) as run:
        run.client.send(b"x")
        with await accept_socket(server) as far:
            assert await receive(far) == b"x"
            ending, going = (run.client, far) if first == "client" else (far, run.client)
            half_close(ending)
            assert await receive(going) == b""
            for _ in range(5):  # traffic puts it off
                await run.note()
                await clock.advance(500)
                assert not run.ended.is_set()
                going.send(b"y")
                assert await receive(ending) == b"y"
            await run.note()
            assert await end_in(run, clock, 600) == "half-closed, and the other direction was idle for 600 s"


@pytest.mark.parametrize("sender", ["client", "server"])
async def test_an_idle_connection_ends_and_a_byte_either_way_puts_it_off(
    tmp_path: Path, server: socket.socket, clock: HandClock, sender: str
) -> None:
    command = FakeClient(tmp_path, "serve").command
    async with relayed(command, port_of(server), idle_s=3600) as run:
        run.client.send(b"x")
        with await accept_socket(server) as far:
            assert await receive(far) == b"x"
            source, sink = (run.client, far) if sender == "client" else (far, run.client)
            for _ in range(3):
                await run.note()
                await clock.advance(3000)
                assert not run.ended.is_set()
                source.send(b"y")
                assert await receive(sink) == b"y"
            await run.note()
            assert await end_in(run, clock, 3600) == "idle for 3600 s"


@pytest.mark.parametrize("is_half_closed", [False, True])
async def test_time_in_which_the_listener_was_stopped_counts_as_nobodys_silence(
    tmp_path: Path, server: socket.socket, clock: HandClock, is_half_closed: bool
) -> None:
    command = FakeClient(tmp_path, "serve").command
    async with relayed(command, port_of(server), half_close_s=600, idle_s=3600) as run:
        run.client.send(b"x")
        with await accept_socket(server) as far:
            assert await receive(far) == b"x"
            if is_half_closed:
                half_close(run.client)
                assert await receive(far) == b""
            await run.note()
            await clock.jump(5000)
            assert not run.ended.is_set()
            far.send(b"y")
            assert await receive(run.client) == b"y"


async def end_in(run: Relayed, clock: HandClock, seconds: float) -> str | None:
    """The error with which it ends when so much time passes; the last byte may count from its end only."""
    for _ in range(2):
        await clock.advance(seconds)
    return (await run.end()).error


async def test_the_stock_service_ends_with_its_server(tmp_path: Path, server: socket.socket) -> None:
    async with relayed(FakeClient(tmp_path, "stock").command, port_of(server)) as run:
        run.client.send(b"question")
        with await accept_socket(server) as far:
            assert await receive(far) == b"question"
            far.send(b"answer")
        assert await receive(run.client) == b"answer"
        assert await receive(run.client) == b""
        assert (await run.end()).error is None


async def test_a_program_that_does_not_exist_is_a_refusal_that_names_it() -> None:
    client, accepted = tcp_pair()
    with client, accepted:
        async with open_relay_thread() as relays, trio.open_nursery() as nursery:
            caller = Caller(("/nonexistent",), "work", "s+1", CallBudget(nursery))
            with pytest.raises(RefusedError, match="cannot start /nonexistent: No such file"):
                await relay_over_call(accepted, caller, relays, CallTimeouts())


async def test_a_socket_that_cannot_be_watched_is_an_error_of_its_connection(tmp_path: Path) -> None:
    with Path("/dev/null").open("rb") as file:  # noqa: ASYNC230

        class NoSocket(socket.socket):
            def fileno(self) -> int:
                return file.fileno()

            def getpeername(self) -> tuple[str, int]:
                return "127.0.0.1", 1

        with NoSocket() as accepted:
            async with open_relay_thread() as relays, trio.open_nursery() as nursery:
                caller = Caller(FakeClient(tmp_path, "hang").command, "w", "s+1", CallBudget(nursery))
                with trio.fail_after(BOUND_S):
                    ending = await relay_over_call(accepted, caller, relays, CallTimeouts())
        assert ending.error is not None
        assert "cannot watch" in ending.error


@pytest.mark.usefixtures("bugs_are_wanted")
async def test_a_bug_ends_it_and_is_not_called_the_clients_abort(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with relayed(FakeClient(tmp_path, "serve").command, port_of(server)) as run:
        run.client.send(b"x")
        with await accept_socket(server) as far:
            assert await receive(far) == b"x"

            def fail(*_: object) -> None:
                raise ZeroDivisionError("a bug")

            monkeypatch.setattr(Relay, "_pull", fail)
            run.client.send(b"x")
            assert (await run.end()).error == "a bug of this program; its log says more"
