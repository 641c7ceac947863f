# SPDX-License-Identifier: GPL-2.0-or-later
import errno
import os
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Self

import pytest
from helpers import BOUND_S, free_port, no_fds_left, port_of

from qubes_fwd_qrexec.common.values import address_text
from qubes_fwd_qrexec.relay import acceptloop
from qubes_fwd_qrexec.relay.acceptloop import (
    Acceptor,
    AcceptTurns,
    BindError,
    SocketAddress,
    address_of,
    open_listening,
)
from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.system.bugs import Bugs


@pytest.mark.parametrize(
    ("listen", "open_to", "closed_to"),
    [
        ("127.0.0.1", ["127.0.0.1"], ["127.0.0.2", "::1"]),
        ("0.0.0.0", ["127.0.0.1", "127.0.0.2"], ["::1"]),
        ("::1", ["::1"], ["127.0.0.1"]),
        ("::", ["::1"], ["127.0.0.1"]),
    ],
)
def test_exactly_what_is_said_is_bound(listen: str, open_to: list[str], closed_to: list[str]) -> None:
    port = free_port()
    with open_listening(ip_address(listen), port):
        for host in open_to:
            socket.create_connection((host, port)).close()
        for host in closed_to:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((host, port))


def test_v4_and_v6_share_a_port() -> None:
    port = free_port()
    with open_listening(IPv4Address(0), port), open_listening(IPv6Address(0), port):
        pass


def test_a_port_in_use_is_named_and_leaves_nothing() -> None:
    with open_listening(IPv4Address("127.0.0.1"), 0) as first, no_fds_left():
        port = port_of(first)
        with pytest.raises(BindError, match=f"127.0.0.1:{port}: the port is in use by this program itself"):
            open_listening(IPv4Address("127.0.0.1"), port)


def test_an_address_that_is_not_here_is_said_to_be() -> None:
    with pytest.raises(BindError, match=r"192\.0\.2\.77:80: this qube does not have the address"):
        open_listening(IPv4Address("192.0.2.77"), 80)


@pytest.mark.parametrize(
    ("number", "port", "words"),
    [(errno.EACCES, 80, "CAP_NET_BIND_SERVICE"), (errno.EACCES, 8080, "Permission denied")],
)
def test_a_low_port_without_the_capability_is_explained(number: int, port: int, words: str) -> None:
    assert words in acceptloop.bind_trouble(OSError(number, "x"), IPv4Address(0), port)


def test_no_socket_at_all_is_a_bind_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, "no such family")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(BindError, match="no such family"):
        open_listening(IPv6Address("::1"), 80)


class Accepting:
    """An acceptor in a loop; ``accepted`` are the connections, with the clients' addresses."""

    def __init__(self, listening: socket.socket | None = None, bugs: Bugs | None = None) -> None:
        self.loop = Loop(bugs)
        self.accepted: dict[SocketAddress, socket.socket] = {}
        self.listening = listening or open_listening(IPv4Address("127.0.0.1"), 0)
        self.port = port_of(self.listening)
        self.acceptor = Acceptor(self.loop, self.listening, self.take, AcceptTurns())

    def take(self, sock: socket.socket, peer: SocketAddress) -> None:
        self.accepted[peer] = sock

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), BOUND_S)

    def reach(self, count: int) -> None:
        """Turn until so many are accepted."""
        until_s = time.monotonic() + BOUND_S
        while len(self.accepted) < count:
            assert time.monotonic() < until_s
            self.loop.run_once(BOUND_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.acceptor.close()
        self.loop.close()
        for sock in self.accepted.values():
            sock.close()


def test_a_burst_is_accepted_in_turns_and_each_connection_is_ready_for_the_relay() -> None:
    with no_fds_left(), ExitStack() as clients, Accepting() as accepting:
        ours = {clients.enter_context(accepting.connect()) for _ in range(acceptloop.BURST + 10)}
        accepting.loop.run_once(BOUND_S)
        assert len(accepting.accepted) == 1  # whose request is sent on before the others are looked for
        accepting.loop.run_once(BOUND_S)
        assert len(accepting.accepted) == 1 + acceptloop.BURST
        accepting.reach(len(ours))
        assert set(accepting.accepted) == {sock.getsockname() for sock in ours}
        for sock in accepting.accepted.values():
            assert not sock.getblocking()
            assert not sock.get_inheritable()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack("ii", 1, 0)


def test_one_turn_accepts_no_more_at_many_ports_than_at_one() -> None:
    """A rule may have thousands of ports, and a client connects to all of them."""
    ports, each = 2 * acceptloop.BURST, acceptloop.BURST
    with no_fds_left(), Accepting() as accepting, ExitStack() as stack:
        turns = AcceptTurns()
        counts = Counter[int]()

        def take(sock: socket.socket, _peer: SocketAddress) -> None:
            counts[accepting.loop.turn] += 1
            sock.close()

        for _ in range(ports):
            listening = open_listening(IPv4Address("127.0.0.1"), 0)
            stack.callback(Acceptor(accepting.loop, listening, take, turns).close)
            for _ in range(each):
                stack.enter_context(socket.create_connection(("127.0.0.1", port_of(listening)), BOUND_S))
        until_s = time.monotonic() + BOUND_S
        while counts.total() < ports * each:
            assert time.monotonic() < until_s  # the kernel may still be bringing the last ones
            accepting.loop.run_once(1.0)
        assert max(counts.values()) <= max(ports, acceptloop.BURST)


def test_what_the_kernel_holds_for_a_connection_is_set_and_does_not_grow() -> None:
    """docs/behaviours.md, 17; of what is asked for the kernel takes net.core.?mem_max, and doubles it."""
    with Accepting() as accepting, accepting.connect() as client:
        accepting.reach(1)
        (accepted,) = accepting.accepted.values()
        held = [
            accepted.getsockopt(socket.SOL_SOCKET, which) for which in (socket.SO_SNDBUF, socket.SO_RCVBUF)
        ]
        assert held == [2 * min(212_992, most_bytes(name)) for name in ("wmem_max", "rmem_max")]
        # Its own tuning would go on as bytes come and are taken.
        client.settimeout(BOUND_S)
        accepted.settimeout(BOUND_S)
        for source, sink in ((client, accepted), (accepted, client)):
            for _ in range(64):
                source.sendall(bytes(65_536))
                left = 65_536
                while left:
                    left -= len(sink.recv(left))
        after = [
            accepted.getsockopt(socket.SOL_SOCKET, which) for which in (socket.SO_SNDBUF, socket.SO_RCVBUF)
        ]
        assert after == held


def most_bytes(name: str) -> int:
    return int(Path(f"/proc/sys/net/core/{name}").read_text())


def test_closed_it_accepts_nobody_and_a_second_time_changes_nothing() -> None:
    with no_fds_left(), Accepting() as accepting, accepting.connect() as client:
        for _ in range(2):
            accepting.acceptor.close()
        assert accepting.acceptor.is_closed
        assert not accepting.loop.watched
        accepting.loop.run_once(0)
        assert not accepting.accepted
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_copy_in_a_starting_child_keeps_no_port_open() -> None:
    with Accepting() as accepting, accepting.listening.dup():
        accepting.acceptor.close()
        with pytest.raises(ConnectionRefusedError):
            accepting.connect()


def test_closing_from_within_an_accepted_connection_is_fine() -> None:
    with no_fds_left(), ExitStack() as undo:
        listening = open_listening(IPv4Address("127.0.0.1"), 0)
        loop = Loop()
        undo.callback(loop.close)
        met: list[socket.socket] = []

        def accepted(sock: socket.socket, _: SocketAddress) -> None:
            met.append(undo.enter_context(sock))
            if len(met) == 2:
                acceptor.close()

        acceptor = Acceptor(loop, listening, accepted, AcceptTurns())
        for _ in range(4):
            undo.enter_context(socket.create_connection(listening.getsockname()))
        for _ in range(3):
            loop.run_once(0)
        assert len(met) == 2


class Failing(socket.socket):
    """A listening socket that answers accept() with errors first."""

    errors: list[int]

    def accept(self) -> tuple[socket.socket, object]:  # type: ignore[override]
        if self.errors:
            number = self.errors.pop(0)
            raise OSError(number, os.strerror(number))
        return super().accept()


def failing_with(errors: list[int]) -> Failing:
    failing = Failing(fileno=open_listening(IPv4Address("127.0.0.1"), 0).detach())
    failing.setblocking(False)
    failing.errors = errors
    return failing


# docs/behaviours.md, 34, written out: to wait and say so, and to go on at once without a word.
SHORTAGES = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]
PEERS_OWN = [
    *(errno.ECONNABORTED, errno.EPROTO, errno.EPERM),
    # accept(2): errors of the network that are waiting on the new socket.
    *(errno.ENETDOWN, errno.ENOPROTOOPT, errno.EHOSTDOWN, errno.ENONET),
    *(errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH),
]


@pytest.mark.parametrize("number", SHORTAGES + PEERS_OWN, ids=errno.errorcode.get)
@pytest.mark.usefixtures("said_once")
def test_no_trouble_of_a_connection_or_shortage_ends_the_loop(
    number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptloop, "SHORTAGE_PAUSE_S", 0.001)
    with Accepting(failing_with([number] * 3)) as accepting, accepting.connect():
        accepting.reach(1)
    assert len(caplog.messages) == (number in SHORTAGES)


def test_while_something_is_short_it_is_not_asked_for_in_each_turn() -> None:
    """docs/behaviours.md, 33: a listening socket that cannot be accepted from is ready all the time."""
    failing = failing_with([errno.EMFILE] * 3)
    with Accepting(failing) as accepting, accepting.connect():
        for _ in range(10):
            accepting.loop.run_once(0)
        assert len(failing.errors) == 2
        assert accepting.loop.timers_left == 1
        accepting.acceptor.close()
        accepting.loop.run_once(BOUND_S)  # the pause is over, and nobody is there to go on


@pytest.mark.usefixtures("bugs_are_wanted")
def test_any_other_trouble_is_a_bug_and_others_are_still_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an unknown error of accept() nor a bug in handling a connection ends the loop."""
    monkeypatch.setattr(acceptloop, "SHORTAGE_PAUSE_S", 0.001)
    bugs = Bugs()
    met: list[socket.socket] = []
    with ExitStack() as undo:
        loop = Loop(bugs)
        undo.callback(loop.close)
        failing = failing_with([errno.EINVAL])

        def accepted(connection: socket.socket, _: SocketAddress) -> None:
            met.append(undo.enter_context(connection))
            if len(met) == 1:
                raise ZeroDivisionError("a bug")

        acceptor = Acceptor(loop, failing, accepted, AcceptTurns())
        undo.callback(acceptor.close)
        first, other = (
            undo.enter_context(socket.create_connection(failing.getsockname(), BOUND_S)) for _ in range(2)
        )
        until_s = time.monotonic() + BOUND_S
        while len(met) < 2:
            assert time.monotonic() < until_s
            loop.run_once(BOUND_S)
        with pytest.raises(ConnectionResetError):
            first.recv(1)
        met[1].send(b"x")
        assert other.recv(1) == b"x"
    assert bugs.count == 2


def test_a_shortage_is_waited_out_for_a_tenth_of_a_second_to_a_second() -> None:
    """docs/behaviours.md, 33 and 34: neither does it spin, nor are free descriptors left lying."""
    assert 0.1 <= acceptloop.SHORTAGE_PAUSE_S <= 1.0


_LOW_PORT = """
import os, sys
from ipaddress import ip_address
from qubes_fwd_qrexec.relay.acceptloop import BindError, open_listening
if os.geteuid() == 0:
    os.setuid(65534)
try:
    open_listening(ip_address(sys.argv[1]), 80)
except BindError as error:
    print(error)
"""


@pytest.mark.skipif(
    int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 80,
    reason="here everybody may listen on low ports",
)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_program_without_privileges_learns_what_a_low_port_needs(host: str) -> None:
    """docs/behaviours.md, 41."""
    found = subprocess.run(
        [sys.executable, "-c", _LOW_PORT, host], capture_output=True, text=True, timeout=BOUND_S, check=True
    )
    assert found.stdout.startswith(address_text(host, 80))
    assert "ports under 1024 need the capability CAP_NET_BIND_SERVICE" in found.stdout


def test_a_peer_in_mapped_form_counts_as_ipv4() -> None:
    with socket.socket(socket.AF_INET6) as both:
        both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        both.bind(("::", 0))
        both.listen()
        with socket.create_connection(("127.0.0.1", port_of(both))):
            near, (host, *_) = both.accept()
            with near:
                assert address_of(host) == IPv4Address("127.0.0.1")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8::7", "2001:db8::7"),
        ("fe80::7%eth0", "fe80::7%eth0"),
        ("fe80::7%eth%d", "fe80::7"),
    ],
)
def test_any_address_that_a_client_has_is_read(host: str, address: str) -> None:
    assert str(address_of(host)) == address
