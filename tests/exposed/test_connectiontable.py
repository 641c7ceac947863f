# SPDX-License-Identifier: GPL-2.0-or-later
"""Whoever is let in and for how long; with real sockets, and carriers that only keep what they are given."""

import math
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Self

import pytest
from helpers import BOUND_S, free_port, no_fds_left

from qubes_fwd_qrexec.common.clientreport import WhichClients
from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.report import Way
from qubes_fwd_qrexec.exposed import connectiontable
from qubes_fwd_qrexec.exposed.connection import Connection
from qubes_fwd_qrexec.exposed.connectionlog import How
from qubes_fwd_qrexec.exposed.connectiontable import ConnectionTable, TableMeans
from qubes_fwd_qrexec.exposed.limits import Process
from qubes_fwd_qrexec.exposed.openports import bindings
from qubes_fwd_qrexec.relay.acceptloop import open_listening
from qubes_fwd_qrexec.relay.copy import abort
from qubes_fwd_qrexec.relay.loop import Loop

RST, OPEN = "RST", "open"


class Keeps:
    """A carrier: ``waiting`` are those that it would give to another one."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.waiting: set[Connection] = set()
        self.then: Callable[[Connection], None] = lambda connection: None

    def carry(self, connection: Connection) -> None:
        connection.carrier = self
        self.connections.append(connection)
        self.then(connection)

    def forget(self, connection: Connection) -> bool:
        return connection in self.waiting

    def end(self, connection: Connection) -> None:
        abort(connection.sock)
        connection.over(How.CUT)


class Bench:
    def __init__(self, means: TableMeans | None = None, **options: str) -> None:
        self.port = free_port("0.0.0.0")
        self.loop = Loop()
        self.carrier = Keeps()
        self.means = means or TableMeans()
        self._clients = ExitStack()
        self.table = ConnectionTable(self.config(**options), "work web", self.carrier, self.loop, self.means)
        self.table.open({place: open_listening(*place) for place in bindings(self.table.config)})

    def config(self, **options: str) -> ListenerConfig:
        given = {"listen": "127.0.0.1", "srchosts": "127.0.0.0/8", "dstports": "80-80"}
        given |= {"srcports": f"{self.port}-{self.port}", "side": "vifs", "transport": "mux"} | options
        text = " ".join(f"{name.replace('_', '-')}={value}" for name, value in given.items())
        return ListenerConfig.parse("fwd.work.web", f"version=1 service=qubes.ForwardTCP {text}")

    def take(self, carrier: Keeps | None = None, drain_s: float = 60.0, **options: str) -> None:
        config = self.config(**options)
        self.table.take(config, "work web", carrier or self.carrier, drain_s)

    def client(self, own: str = "127.0.0.1", to: str = "127.0.0.1") -> socket.socket:
        """A client; the table has accepted it, or refused it."""
        client = self._clients.enter_context(socket.socket())
        client.bind((own, 0))
        client.settimeout(BOUND_S)
        client.connect((to, self.port))
        before = self.seen
        until_s = time.monotonic() + BOUND_S
        while self.seen == before:
            assert time.monotonic() < until_s
            self.loop.run_once(BOUND_S)
        return client

    @property
    def seen(self) -> int:
        counters = self.table.counters
        return counters.total + sum(counters.refusals.values())

    @property
    def refusals(self) -> dict[str, int]:
        return self.table.counters.refusals

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.table.give_up(self.table.listening)
        self.table.cut()
        assert (self.table.connections, self.table.account.connections) == (set(), 0)
        assert not self.loop.watched
        self.loop.close()
        self._clients.close()


def state(client: socket.socket) -> str:
    """Whether it has met an abort; no end of file is met here."""
    client.setblocking(False)
    try:
        assert client.recv(1), "an end of file"
    except BlockingIOError:
        return OPEN
    except ConnectionResetError:
        return RST
    return "bytes"


# Whoever is let in


def test_who_is_let_in_is_carried_and_known_by_its_addresses() -> None:
    with no_fds_left(), Bench(listen="0.0.0.0", dstports="8000-8000") as bench:
        client = bench.client(to="127.0.0.3")
        (connection,) = bench.carrier.connections
        assert bench.table.connections == {connection}
        origin = connection.origin()
        assert (str(origin.client), origin.client_port) == client.getsockname()
        assert (str(origin.exposed), origin.exposed_port) == ("127.0.0.3", bench.port)
        assert connection.target_port == 8000
        assert connection.client_name() == client.getsockname()
        assert state(client) == OPEN


def test_a_stranger_is_an_abort_and_nothing_is_kept_of_it() -> None:
    with no_fds_left(), Bench(srchosts="127.0.0.2/32") as bench:
        assert state(bench.client()) == RST
        assert (bench.carrier.connections, bench.refusals) == ([], {"srchosts": 1})
        assert bench.table.account.clients_remembered == 0
        assert state(bench.client("127.0.0.2")) == OPEN


def test_who_has_left_before_it_is_accepted_is_not_carried() -> None:
    with no_fds_left(), Bench() as bench:
        abort(socket.create_connection(("127.0.0.1", bench.port)))
        client = bench.client()
        (connection,) = bench.carrier.connections
        assert connection.client_name() == client.getsockname()
        assert (bench.table.counters.total, bench.refusals) == (1, {})


def test_one_too_many_is_an_abort() -> None:
    with no_fds_left(), Bench(limits="per-source:1") as bench:
        first = bench.client()
        assert state(bench.client()) == RST
        assert state(first) == OPEN
        assert bench.refusals == {"per-source": 1}


def test_the_idlest_makes_room_in_another_forward_too() -> None:
    means = TableMeans(Process(2))
    with no_fds_left(), Bench(means, limits="connections:2") as one, Bench(means) as other:
        clients = [one.client(), one.client()]
        one.carrier.connections[1].by = SimpleNamespace(sent=1, received=0, moved_at=math.inf, is_joined=True)
        assert state(other.client("127.0.0.9")) == OPEN
        assert [state(client) for client in clients] == [RST, OPEN]
        assert (one.refusals, other.refusals) == ({"made-room": 1}, {})
        assert means.process.connections == 2


@pytest.mark.usefixtures("bugs_are_wanted")
def test_a_bug_ends_its_connection_and_gives_its_place_back() -> None:
    with no_fds_left(), Bench() as bench:

        def fail(connection: Connection) -> None:
            raise ZeroDivisionError("a bug")

        bench.carrier.then = fail
        assert state(bench.client()) == RST
        assert (bench.loop.bugs.count, bench.table.connections) == (1, set())
        bench.carrier.then = lambda connection: None
        assert state(bench.client()) == OPEN


@pytest.mark.usefixtures("bugs_are_wanted")
@pytest.mark.parametrize(
    "end",
    [
        lambda bench: bench.table.cut(),
        lambda bench: bench.table.cut_clients(WhichClients()),
        lambda bench: bench.take(srchosts="10.0.0.0/8"),
        lambda bench: (
            bench.take(srchosts="10.0.0.0/8", on_expire="drain", drain_s=0),
            bench.loop.run_once(),
        ),
    ],
    ids=["all", "some", "narrowed", "at a deadline"],
)
def test_a_bug_in_ending_one_keeps_neither_that_one_nor_others(
    end: Callable[["Bench"], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connectiontable, "TICK_S", 0.0)
    with no_fds_left(), Bench() as bench:
        clients = [bench.client() for _ in range(3)]

        def fail(connection: Connection) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(bench.carrier, "end", fail)
        end(bench)
        bench.loop.run_once(0)
        assert [state(client) for client in clients] == [RST] * 3
        assert bench.loop.bugs.count == 3
        assert (bench.table.connections, bench.table.account.connections) == (set(), 0)


@pytest.mark.usefixtures("bugs_are_wanted")
def test_a_bug_in_telling_of_a_refusal_keeps_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    with no_fds_left(), Bench() as bench:
        monkeypatch.setattr(bench.table, "failed", fail)
        bench.carrier.then = lambda connection: connection.refuse("policy", "dom0 says no")
        assert state(bench.client()) == RST
        assert (bench.table.connections, bench.table.account.connections) == (set(), 0)


def test_what_is_not_carried_is_counted_logged_once_and_shows_the_way(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with no_fds_left(), Bench() as bench:
        bench.carrier.then = lambda connection: connection.refuse("policy", "dom0 says no")
        for _ in range(2):
            assert state(bench.client()) == RST
        assert bench.refusals == {"policy": 2}
        assert bench.table.way is Way.REFUSED
        assert bench.table.counters.last_error is not None
        assert [record.message for record in caplog.records] == ["work web: 127.0.0.1: dom0 says no"]
        bench.carrier.then = lambda connection: None
        bench.client()
        (connection,) = bench.table.connections
        abort(connection.sock)
        connection.over(How.CLOSED)
        assert bench.table.way is Way.IDLE


# A new configuration


def test_what_it_no_longer_allows_is_cut_and_the_rest_goes_on() -> None:
    with no_fds_left(), Bench() as bench:
        one, other = bench.client("127.0.0.2"), bench.client("127.0.0.3")
        bench.take(srchosts="127.0.0.3/32")
        assert (state(one), state(other)) == (RST, OPEN)
        bench.take(srchosts="127.0.0.3/32", dstports="81-81")
        assert state(other) == RST


def test_what_drains_ends_in_time_and_goes_on_if_it_is_allowed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(connectiontable, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(connectiontable, "TICK_S", 0.0)
    with no_fds_left(), Bench(on_expire="drain") as bench:
        client = bench.client()
        (connection,) = bench.table.connections
        for change in ({"srchosts": "127.0.0.2/32"}, {}, {"dstports": "81-81"}):
            bench.take(on_expire="drain", **change)
            assert (connection.ends_at < math.inf) is bool(change)
            now[0] += 59.0
            bench.loop.run_once(0)
            assert state(client) == OPEN
        bench.take(on_expire="drain", dstports="81-81", limits="rate:9")  # which gives it no more time
        for _ in range(3):
            bench.loop.run_once(0)
            assert state(client) == OPEN
        now[0] += 2.0
        bench.loop.run_once(0)
        assert state(client) == RST
        assert bench.loop.timers_left == 0


def test_who_waits_for_a_call_waits_for_one_of_the_new_carrier_and_as_it_says() -> None:
    with no_fds_left(), Bench() as bench:
        waits, carried = bench.client(), bench.client()
        waiting, other = bench.carrier.connections
        bench.carrier.waiting = {waiting}
        new = Keeps()
        bench.take(new, proxy="v2")
        assert new.connections == [waiting]
        assert (waiting.carrier, other.carrier) == (new, bench.carrier)
        assert (waiting.config.proxy, other.config.proxy) == ("v2", "off")
        assert (state(waits), state(carried)) == (OPEN, OPEN)
        bench.take(new)  # the same one again, which has it already
        assert new.connections == [waiting]


# Endings


def test_closed_it_accepts_nobody_and_connections_go_on() -> None:
    with no_fds_left(), Bench() as bench:
        client = bench.client()
        bench.table.give_up(bench.table.listening)
        assert bench.table.listening == frozenset()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", bench.port))
        assert state(client) == OPEN
        bench.table.cut()
        assert state(client) == RST


def test_closed_in_the_turn_in_which_clients_come_it_has_each_of_them_or_they_meet_an_abort() -> None:
    """The forward ends after one connection of a burst was let in: the next ones are not accepted."""
    with no_fds_left(), Bench() as bench, ExitStack() as undo:
        bench.carrier.then = lambda connection: bench.table.give_up(bench.table.listening)
        clients = [
            undo.enter_context(socket.create_connection(("127.0.0.1", bench.port), BOUND_S)) for _ in range(3)
        ]
        bench.loop.run_once(BOUND_S)
        assert bench.table.counters.total == 1
        assert [state(client) for client in clients] == [OPEN, RST, RST]


def test_clients_that_are_cut_are_counted_once() -> None:
    with no_fds_left(), Bench() as bench:
        one, other = bench.client("127.0.0.2"), bench.client("127.0.0.3")
        which = WhichClients.parse("127.0.0.2")
        cut = bench.table.cut_clients(which)
        assert [connection.cut_as for connection in cut] == [How.CUT_BY_ADMIN]
        assert (state(one), state(other)) == (RST, OPEN)
        assert not bench.table.cut_clients(which)


def test_one_that_ends_later_is_cut_once_and_ends_as_what_cut_it_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A call of its own ends in another thread."""
    caplog.set_level("INFO")
    with no_fds_left(), Bench() as bench:
        ends: list[Connection] = []
        bench.carrier.end = ends.append  # type: ignore[method-assign]
        client = bench.client()
        (connection,) = bench.table.connections
        assert bench.table.cut_clients(WhichClients()) == {connection}
        assert not bench.table.cut_clients(WhichClients())
        bench.table.cut()
        assert ends == [connection]
        assert state(client) == OPEN
        client.close()
        abort(connection.sock)
        connection.over(How.ABORTED)
        assert "how=cut-by-admin" in caplog.messages[-1]


def test_bytes_of_those_that_live_and_of_those_that_have_ended_are_told_apart() -> None:
    with no_fds_left(), Bench() as bench:
        bench.client()
        bench.client()
        ended, living = bench.carrier.connections
        for connection in (ended, living):
            connection.by = SimpleNamespace(sent=3, received=5, moved_at=0.0, is_joined=True)
        ended.cut()
        bench.table.counters.refused("srchosts")
        assert bench.table.figures() == ((living,), 3, 5, {"srchosts": 1})


def test_sockets_that_cannot_be_watched_are_closed_and_those_that_were_there_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with no_fds_left(), Bench() as bench:
        ports = [free_port(), free_port()]
        (address, _) = next(iter(bench.table.listening))
        real = bench.loop.watch
        left = [1]

        def watch(*arguments: object) -> None:
            if not left.pop():
                raise OSError(28, "No space left on device")
            left.append(0)
            real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(bench.loop, "watch", watch)
        with pytest.raises(OSError, match="No space"):
            bench.table.open({(address, port): open_listening(address, port) for port in ports})
        assert bench.table.listening == {(address, bench.port)}
