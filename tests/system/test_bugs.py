# SPDX-License-Identifier: GPL-2.0-or-later
"""A bug of ours ends what it happened to, and nothing else; tests/relay/test_loop.py has the guard itself."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import nobody, tcp_pair, unix_pair
from mux_peer import PeerBench

from qubes_fwd_qrexec.mux import Connection, ResetCode, ResetReceived, Role
from qubes_fwd_qrexec.relay.backlog import Backlog
from qubes_fwd_qrexec.relay.copy import Copy, CopyEnd, Relay, half_close
from qubes_fwd_qrexec.relay.leg import Leg
from qubes_fwd_qrexec.relay.leg_end import LegEnd
from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.system import bugs
from qubes_fwd_qrexec.system.bugs import Bugs

pytestmark = pytest.mark.usefixtures("bugs_are_wanted")
ROLES = pytest.mark.parametrize("role", Role)


@pytest.fixture
def bench(role: Role) -> Iterator[PeerBench]:
    with PeerBench(role) as bench:
        yield bench


def once(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Make the next call of a method raise what nobody expects of it."""
    real = getattr(owner, name)

    def fail(*arguments: object) -> object:
        monkeypatch.setattr(owner, name, real)
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(owner, name, fail)


def is_reset(sock: socket.socket) -> bool:
    try:
        return not sock.recv(100) and False
    except ConnectionResetError:
        return True


# A stream


@ROLES
@pytest.mark.parametrize("method", ["deliver", "receive_eof", "resume", "abort_from_there", "_pull"])
def test_a_bug_in_one_stream_resets_that_stream(
    bench: PeerBench, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hit, other = bench.open(), bench.open()
    leg = bench.mux.legs[hit]
    once(monkeypatch, Leg, method)
    match method:
        case "deliver":
            bench.peer.send_data(hit, b"x")
        case "receive_eof":
            bench.peer.send_eof(hit)
        case "resume":
            bench.peer.grant(hit, 65536)
        case "abort_from_there":
            bench.peer.reset_stream(hit)
        case "_pull":
            bench.socks[hit].send(b"x")
    # In the same chunk, and so behind the bug, is something for the other one.
    bench.peer.send_data(other, b"ping")
    bench.say()
    bench.turn(3)
    assert is_reset(bench.socks[hit])
    assert bench.socks[other].recv(100) == b"ping"
    resets = [event for event in bench.hear() if isinstance(event, ResetReceived)]
    if method != "abort_from_there":
        assert resets == [ResetReceived(hit, ResetCode.INTERNAL)]
    assert set(bench.mux.legs) == {other}
    assert leg.ended is LegEnd.BUG
    assert not bench.owner.is_over
    assert bench.loop.bugs.count == 1


@ROLES
def test_a_bug_in_ending_one_stream_does_not_stop_the_others_from_ending(
    bench: PeerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [bench.open() for _ in range(3)]
    once(monkeypatch, Leg, "abort_from_there")
    bench.mux.close()
    bench.turn(3)
    bench.clock.advance(1.0)
    bench.turn(3)
    assert bench.owner.is_over
    assert all(is_reset(bench.socks[stream_id]) for stream_id in streams)
    assert bench.budget.streams == 0


def test_a_bug_in_beginning_a_stream_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with PeerBench(Role.TARGET) as bench:
        once(monkeypatch, PeerBench, "_accept")
        bench.owner.answer = lambda event: bench._accept(event)
        bench.peer.open_stream(8080, bench.origin, 65536)
        bench.say()
        bench.turn(2)
        assert bench.hear() == [ResetReceived(1, ResetCode.INTERNAL)]
        assert bench.owner.abandoned == [1]
        bench.open()
        assert not bench.owner.is_over


# The call


@ROLES
@pytest.mark.parametrize(
    ("owner", "method"), [(Connection, "receive_data"), (Connection, "tick"), (Backlog, "send")]
)
def test_a_bug_in_the_call_as_a_whole_ends_that_call_and_the_loop_goes_on(
    bench: PeerBench, owner: type, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream_id = bench.open()
    once(monkeypatch, owner, method)
    bench.peer.send_data(stream_id, b"x")
    bench.peer.send_eof(stream_id)
    bench.say()
    bench.turn()
    bench.clock.advance(1.0)
    bench.turn()
    assert bench.owner.is_over
    assert bench.owner.problem == "a bug of this end; its log says more"
    bench.clock.advance(1.0)
    bench.turn()
    assert bench.mux.legs == {}
    done: list[bool] = []
    bench.loop.soon(lambda: done.append(True), nobody)
    bench.turn()
    assert done


# `call`


@pytest.mark.parametrize("which", ["source", "sink"])
def test_a_bug_in_one_copy_ends_only_what_shares_its_socket(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()
    relay = Relay(loop)
    ends: dict[str, CopyEnd] = {}
    client, accepted = tcp_pair()
    near, far = unix_pair()
    other_in, source = unix_pair()
    sink, other_out = unix_pair()
    socks = (client, accepted, near, far, other_in, source, sink, other_out)
    for name, copy in (
        ("up", Copy(accepted, near)),
        ("down", Copy(near, accepted)),
        ("other", Copy(source, sink)),
    ):
        relay.start(copy, lambda how, name=name: ends.__setitem__(name, how))  # type: ignore[misc]
    once(monkeypatch, Relay, "_pull")
    (client if which == "source" else far).send(b"x")
    loop.run_once(0)
    assert ends == dict.fromkeys(("up", "down"), CopyEnd.BUG)
    half_close(other_in)
    loop.run_once(0)
    assert ends["other"] is CopyEnd.EOF
    assert loop.bugs.count == 1
    for sock in socks:
        sock.close()
    loop.close()


# How they are told


def test_each_kind_is_logged_once_and_all_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    noted: list[bool] = []
    found = Bugs(lambda: noted.append(True))

    def one() -> None:
        raise KeyError(1)

    def another() -> None:
        raise KeyError(1)

    for _ in range(3):
        found.guarded(nobody, one)
        found.guarded(nobody, another)
    assert found.count == len(noted) == 6
    assert [record.exc_info is not None for record in caplog.records] == [True, True]


def test_what_is_no_bug_passes_through() -> None:
    def leave() -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        Bugs().guarded(nobody, leave)


def test_those_of_processes_that_are_gone_are_told_by_a_file(tmp_path: Path) -> None:
    assert bugs.left(tmp_path) == 0
    for count in (1, 2, 3):
        bugs.leave(tmp_path)
        assert bugs.left(tmp_path) == count
    (tmp_path / "bugs").write_bytes(bytes(bugs.FILE_MAX_BYTES))
    bugs.leave(tmp_path)
    assert bugs.left(tmp_path) == bugs.FILE_MAX_BYTES


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _link(path: Path) -> None:
    (path.parent / "elsewhere").touch()
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("make", [_fifo, _link, Path.mkdir])
def test_whatever_else_has_that_name_counts_nothing_and_stops_nobody(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "bugs")
    bugs.leave(tmp_path)
    assert bugs.left(tmp_path) == 0
    bugs.leave(tmp_path / "missing")
    assert bugs.left(tmp_path / "missing") == 0
