# SPDX-License-Identifier: GPL-2.0-or-later
"""A truncated answer over a single call is an abort, however late its status; a clean end waits for none."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from handclock import HandClock
from helpers import accept_socket, children, port_of
from puppet import Puppet
from test_call import Relayed, receive, relayed

from qubes_fwd_qrexec.exposed import call
from qubes_fwd_qrexec.relay import copy
from qubes_fwd_qrexec.relay.callsigns import GREETING, READ_MAX_BYTES, Signs, clean_end
from qubes_fwd_qrexec.relay.copy import abort, half_close

# Of what is no sign.
GARBAGE = (
    f"x{GREETING}",
    f"{GREETING} x",
    GREETING.upper(),
    "\x1b[2J\N{RIGHT-TO-LEFT OVERRIDE}",
    "x" * 5000 + GREETING,
    clean_end(5),
)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    return HandClock(monkeypatch, call, copy)


@pytest.fixture
def puppet(tmp_path: Path) -> Iterator[Puppet]:
    puppet = Puppet(tmp_path)
    yield puppet
    puppet.close()


def sees_no_end(run: Relayed) -> bool:
    """No FIN has come; the owner of the socket aborts it after a failed connection."""
    try:
        return run.client.recv(1) != b""
    except BlockingIOError:
        return True


@pytest.mark.parametrize("late_s", [0.3, 1, 3])
@pytest.mark.parametrize("status", [137, 255])
async def test_a_late_status_of_an_answer_that_broke_off_is_waited_for(
    puppet: Puppet, clock: HandClock, late_s: float, status: int
) -> None:
    async with relayed(puppet.command, 1) as run:
        await puppet.begin()
        await puppet.do(f"err {GREETING}", "out half")
        assert await receive(run.client) == b"half"
        await puppet.do("end", "read")
        await clock.advance(late_s)
        assert sees_no_end(run)
        puppet.tell(f"exit {status}")
        assert (await run.end()).error == f"the call ended with exit status {status}"
        assert sees_no_end(run)


async def test_a_service_that_is_killed_is_no_clean_end_before_its_status_is_known(
    puppet: Puppet, clock: HandClock, server: socket.socket
) -> None:
    async with relayed(puppet.command, 1) as run:
        await puppet.begin()
        await puppet.do(f"serve {port_of(server)}")
        with await accept_socket(server) as far:
            far.send(b"half")
            assert await receive(run.client) == b"half"
            await puppet.do("kill", "read")
            await clock.advance(3)
            assert sees_no_end(run)
            puppet.tell("exit 137")
            assert (await run.end()).error == "the call ended with exit status 137"
            assert sees_no_end(run)


async def test_a_server_that_does_not_listen_is_no_clean_end_before_the_status_is_known(
    puppet: Puppet, clock: HandClock
) -> None:
    async with relayed(puppet.command, 1) as run:
        await puppet.begin()
        await puppet.do(f"err {GREETING}", "err the server refused", "end", "read")
        await clock.advance(3)
        assert sees_no_end(run)
        puppet.tell("exit 69")
        assert "refused the connection" in str((await run.end()).error)


async def test_a_server_that_ends_first_waits_for_no_status(
    puppet: Puppet, clock: HandClock, server: socket.socket
) -> None:
    """No time passes by the clock of the listener, and its service lives."""
    async with relayed(puppet.command, 1) as run:
        await puppet.begin()
        await puppet.do(f"serve {port_of(server)}")
        with await accept_socket(server) as far:
            far.send(b"answer")
            half_close(far)
            assert await receive(run.client) == b"answer"
            assert await receive(run.client) == b""
            run.client.send(b"more")
            assert await receive(far) == b"more"
            half_close(run.client)
            assert await receive(far) == b""
        puppet.tell("exit 0")
        assert (await run.end()).error is None


@pytest.mark.parametrize("is_first", [True, False])
async def test_stderr_may_come_before_the_end_of_file_and_after(
    puppet: Puppet, clock: HandClock, *, is_first: bool
) -> None:
    signs = [f"err {GREETING}", "err qrexec-client-vm: something else", f"err {clean_end(4)}"]
    async with relayed(puppet.command, 1) as run:
        await puppet.begin()
        await puppet.do("out four", *([*signs, "end"] if is_first else ["end", *signs]))
        assert await receive(run.client) == b"four"
        assert await receive(run.client) == b""


async def test_a_greeting_that_comes_after_the_end_of_file_counts(puppet: Puppet, clock: HandClock) -> None:
    async with relayed(puppet.command, 1) as run:
        await puppet.begin()
        await puppet.do("end", "err x", "read", f"err {GREETING}", "read")
        await clock.advance(3)
        assert sees_no_end(run)


async def test_an_end_of_more_bytes_than_have_come_is_not_clean(puppet: Puppet, clock: HandClock) -> None:
    """stderr can arrive before them, and then the call is lost."""
    async with relayed(puppet.command, 1) as run:
        await puppet.begin()
        await puppet.do(f"err {GREETING}", "out half", f"err {clean_end(8)}")
        assert await receive(run.client) == b"half"
        await puppet.do("end", "read")
        await clock.advance(3)
        assert sees_no_end(run)
        puppet.tell("exit 255")
        assert (await run.end()).error is not None


async def test_a_service_that_never_reports_its_end_is_an_abort(puppet: Puppet, clock: HandClock) -> None:
    async with relayed(puppet.command, 1) as run:
        await puppet.begin()
        await puppet.do(f"err {GREETING}", "end", "read")
        await clock.advance(10)
        assert (await run.end()).error == "the call did not end"
        assert sees_no_end(run)


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
async def test_garbage_is_no_sign(puppet: Puppet, clock: HandClock, garbage: str) -> None:
    """What has not greeted, as a service behind a socket, ends in FIN unless its status comes soon."""
    async with relayed(puppet.command, 1) as run:
        await puppet.begin()
        await puppet.do("out four", f"err {garbage}", "end", "read")
        assert await receive(run.client) == b"four"
        assert sees_no_end(run)
        await clock.advance(0.2)
        assert await receive(run.client) == b""


@pytest.mark.parametrize("is_greeted", [True, False])
async def test_a_flood_behind_the_end_of_file_is_not_read_to_its_end(
    puppet: Puppet, clock: HandClock, *, is_greeted: bool
) -> None:
    async with relayed(puppet.command, 1) as run:
        await puppet.begin()
        await puppet.do("out half", *([f"err {GREETING}"] if is_greeted else []), "end")
        await puppet.do(f"flood {READ_MAX_BYTES // 1000}")  # which has room only because it is read
        puppet.tell("flood 1000000")
        assert await receive(run.client) == b"half"
        await clock.advance(10)
        if is_greeted:
            assert (await run.end()).error == "the call did not end"
        assert sees_no_end(run) == is_greeted


@pytest.mark.parametrize("who", ["the client aborts", "the idle timer"])
async def test_a_flood_on_stderr_stalls_only_its_own_call(puppet: Puppet, clock: HandClock, who: str) -> None:
    before = children()
    async with relayed(puppet.command, 1) as run:
        await puppet.begin()
        await puppet.do("out x")
        puppet.tell("flood 1000000")
        assert await receive(run.client) == b"x"
        if who == "the idle timer":
            await run.note()
            for _ in range(2):
                await clock.advance(3600)
            assert (await run.end()).error == "idle for 3600 s"
        else:
            abort(run.client)
            assert (await run.end()).error == "the client aborted the connection"
    assert children() == before


async def test_the_stock_services_stderr_goes_nowhere(puppet: Puppet) -> None:
    async with relayed(puppet.command, 1, ends_with_server=True) as run:
        await puppet.begin()
        await puppet.do("flood 10000", "out x", "end")
        assert await receive(run.client) == b"x"
        puppet.tell("exit 0")
        assert (await run.end()).error is None


def test_signs_come_in_pieces_of_any_size() -> None:
    signs = Signs(7)
    for byte in f"noise\n{GREETING}\n{clean_end(7)}\n".encode():
        assert not signs.is_clean
        signs.take(bytes([byte]))
    assert signs.will_tell
    assert signs.is_clean


def test_a_line_without_an_end_is_read_up_to_the_bound() -> None:
    signs = Signs(7)
    signs.take(bytes(READ_MAX_BYTES))
    assert signs.left_bytes == 0
    assert not signs.will_tell
