# SPDX-License-Identifier: GPL-2.0-or-later
import errno
import os
import socket
import subprocess
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
import trio
from collected import Collected
from helpers import BOUND_S, free_port, no_fds_left, port_of, tcp_pair
from trio.testing import wait_all_tasks_blocked

from qubes_fwd_qrexec.common.values import address_text
from qubes_fwd_qrexec.relay import acceptloop
from qubes_fwd_qrexec.relay.acceptloop import (
    BindError,
    accept_until_closed,
    address_of,
    close_listening,
    open_listening,
    peer_of,
)
from qubes_fwd_qrexec.relay.copy import abort
from qubes_fwd_qrexec.system.bugs import Bugs
from qubes_fwd_qrexec.system.logs import RateLimit


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


def means() -> tuple[RateLimit, Bugs]:
    return RateLimit(), Bugs()


class Acceptor:
    def __init__(self) -> None:
        self.listening = open_listening(IPv4Address("127.0.0.1"), 0)
        self.port = port_of(self.listening)
        self.accepted: Collected[socket.socket] = Collected()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port))

    def close(self) -> None:
        for sock in self.accepted:
            sock.close()
        self.listening.close()


async def test_a_burst_is_accepted_and_each_connection_is_ready_for_the_relay() -> None:
    acceptor = Acceptor()
    clients = [acceptor.connect() for _ in range(acceptloop.BURST + 10)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_until_closed, acceptor.listening, acceptor.accepted.append, *means())
        await acceptor.accepted.reach(len(clients))
        close_listening(acceptor.listening)
    assert not any(sock.getblocking() or sock.get_inheritable() for sock in acceptor.accepted)
    for sock in clients:
        sock.close()
    acceptor.close()


async def test_what_the_kernel_holds_for_a_connection_is_set_and_does_not_grow() -> None:
    """docs/behaviours.md, 17; of what is asked for the kernel takes net.core.?mem_max, and doubles it."""
    acceptor = Acceptor()
    with acceptor.connect() as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_until_closed, acceptor.listening, acceptor.accepted.append, *means())
            await acceptor.accepted.reach(1)
            close_listening(acceptor.listening)
        (accepted,) = acceptor.accepted
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
    acceptor.close()


def most_bytes(name: str) -> int:
    return int(Path(f"/proc/sys/net/core/{name}").read_text())


async def test_closing_ends_a_waiting_acceptor_and_one_that_has_not_begun() -> None:
    with no_fds_left(), trio.fail_after(BOUND_S):
        for turns in range(3):
            acceptor = Acceptor()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    accept_until_closed, acceptor.listening, acceptor.accepted.append, *means()
                )
                for _ in range(turns):
                    await wait_all_tasks_blocked()
                close_listening(acceptor.listening)


@pytest.mark.parametrize("is_shared", [False, True])
async def test_a_copy_in_a_starting_child_keeps_no_port_open_unless_it_is_shared(is_shared: bool) -> None:
    acceptor = Acceptor()
    with acceptor.listening.dup():
        close_listening(acceptor.listening, is_shared=is_shared)
        close_listening(acceptor.listening)
        if is_shared:
            acceptor.connect().close()
        else:
            with pytest.raises(ConnectionRefusedError):
                acceptor.connect()


async def test_closing_from_within_an_accepted_connection_is_fine() -> None:
    acceptor = Acceptor()
    with acceptor.connect(), acceptor.connect(), trio.fail_after(BOUND_S):

        def accepted(sock: socket.socket) -> None:
            acceptor.accepted.append(sock)
            close_listening(acceptor.listening)

        await accept_until_closed(acceptor.listening, accepted, *means())
    assert len(acceptor.accepted) == 1
    acceptor.close()


class Failing(socket.socket):
    """A listening socket that answers accept() with errors first."""

    errors: list[int]

    def accept(self) -> tuple[socket.socket, object]:  # type: ignore[override]
        if self.errors:
            number = self.errors.pop(0)
            raise OSError(number, os.strerror(number))
        return super().accept()


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
async def test_no_trouble_of_a_connection_or_shortage_ends_the_loop(
    number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptloop, "SHORTAGE_PAUSE_S", 0.001)
    acceptor = Acceptor()
    failing = Failing(fileno=acceptor.listening.detach())
    failing.errors = [number] * 3
    acceptor.listening = failing
    with acceptor.connect():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_until_closed, failing, acceptor.accepted.append, *means())
            await acceptor.accepted.reach(1)
            close_listening(failing)
    assert len(caplog.messages) == (number in SHORTAGES)
    acceptor.close()


@pytest.mark.usefixtures("bugs_are_wanted")
async def test_any_other_trouble_is_a_bug_and_others_are_still_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither an unknown error of accept() nor a bug in handling a connection ends the loop."""
    monkeypatch.setattr(acceptloop, "SHORTAGE_PAUSE_S", 0.001)
    acceptor = Acceptor()
    failing = acceptor.listening = Failing(fileno=acceptor.listening.detach())
    failing.errors = [errno.EINVAL]
    bugs = Bugs()
    met: list[socket.socket] = []

    def accepted(connection: socket.socket) -> None:
        met.append(connection)
        if len(met) == 1:
            raise ZeroDivisionError("a bug")
        acceptor.accepted.append(connection)

    with acceptor.connect() as first, acceptor.connect():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_until_closed, failing, accepted, RateLimit(), bugs)
            await acceptor.accepted.reach(1)
            close_listening(failing)
        first.settimeout(BOUND_S)
        with pytest.raises(ConnectionResetError):
            first.recv(1)
    assert bugs.count == 2
    acceptor.close()


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
        [sys.executable, "-c", _LOW_PORT, host], capture_output=True, text=True, timeout=30, check=True
    )
    assert found.stdout.startswith(address_text(host, 80))
    assert "ports under 1024 need the capability CAP_NET_BIND_SERVICE" in found.stdout


def test_a_peer_is_known_by_its_address_and_port_until_it_is_gone() -> None:
    far, near = tcp_pair()
    with near:
        port = far.getsockname()[1]
        assert peer_of(near) == (IPv4Address("127.0.0.1"), port)
        abort(far)
        assert peer_of(near) is None


def test_a_peer_in_mapped_form_counts_as_ipv4() -> None:
    with socket.socket(socket.AF_INET6) as both:
        both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        both.bind(("::", 0))
        both.listen()
        with socket.create_connection(("127.0.0.1", port_of(both))) as far:
            near, _ = both.accept()
            with near:
                assert peer_of(near) == (IPv4Address("127.0.0.1"), far.getsockname()[1])


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
