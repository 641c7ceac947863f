# SPDX-License-Identifier: GPL-2.0-or-later
import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import pytest
from helpers import BOUND_S

from qubes_fwd_qrexec.system import datagrams
from qubes_fwd_qrexec.system.datagrams import MAX_DATAGRAM_BYTES, READS_MAX, Lost, Sent, reads

# asm-generic/socket.h. The kernel sends no batch for a socket that leaves out checksums.
_SO_NO_CHECK = 11
_LOOPBACK = 1


class _Sockets(ExitStack):
    """Sockets of UDP at loopback addresses, closed with the block."""

    def bound(self, host: str, *, only_ipv6: bool = False) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = self.enter_context(closing(socket.socket(family, socket.SOCK_DGRAM)))
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_ipv6)
        sock.bind((host, 0))
        sock.settimeout(BOUND_S)
        return sock

    def telling(self, host: str) -> socket.socket:
        sock = self.bound(host)
        datagrams.tell_arrivals(sock)
        return sock

    def connected(self, to: socket.socket) -> socket.socket:
        sock = self.bound(to.getsockname()[0])
        sock.connect(to.getsockname())
        return sock


@pytest.fixture
def sockets() -> Iterator[_Sockets]:
    with _Sockets() as sockets:
        yield sockets


def _at(host: str, sock: socket.socket) -> tuple[str, int]:
    return host, sock.getsockname()[1]


def _packed(host: str) -> bytes:
    return ipaddress.ip_address(host).packed


@pytest.mark.parametrize(
    ("bound", "to"),
    [("0.0.0.0", "127.0.0.7"), ("::", "::1"), ("::", "127.0.0.7"), ("127.0.0.7", "127.0.0.7")],
)
def test_a_datagram_comes_with_its_sender_and_the_address_that_it_was_sent_to(
    sockets: _Sockets, bound: str, to: str
) -> None:
    server, client = sockets.telling(bound), sockets.bound("::1" if ":" in to else "127.0.0.1")
    client.sendto(b"question", _at(to, server))
    arrived = datagrams.receive(server)
    assert (arrived.data, arrived.segment) == (b"question", 0)
    assert arrived.sender[1] == client.getsockname()[1]
    assert (arrived.local, arrived.interface, arrived.is_for_one) == (_packed(to), _LOOPBACK, True)


@pytest.mark.parametrize(("bound", "to"), [("0.0.0.0", "127.0.0.7"), ("::", "::1"), ("::", "127.0.0.7")])
@pytest.mark.parametrize("data", [b"answer", b"abcabcab"])
def test_an_answer_leaves_from_the_address_that_was_written_to(
    sockets: _Sockets, bound: str, to: str, data: bytes
) -> None:
    server, client = sockets.telling(bound), sockets.bound("::1" if ":" in to else "127.0.0.1")
    client.connect(_at(to, server))  # so that the kernel lets in that address alone
    client.send(b"question")
    arrived = datagrams.receive(server)
    control = [datagrams.from_address(server, arrived.local)]
    segment = 3 if data != b"answer" else 0
    sent = datagrams.send(server, data, segment, arrived.sender, control)
    assert sent == Sent(datagrams.count(len(data), segment))
    assert b"".join(client.recv(100) for _ in range(sent.datagrams)) == data


def test_what_is_sent_to_many_is_told_from_what_is_sent_to_one(sockets: _Sockets) -> None:
    for bound in ("0.0.0.0", "::"):
        server, client = sockets.telling(bound), sockets.bound("127.0.0.1")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.sendto(b"all", _at("127.255.255.255", server))
        assert not datagrams.receive(server).is_for_one


def test_what_is_sent_to_a_group_of_ipv6_is_told_from_what_is_sent_to_one(sockets: _Sockets) -> None:
    server, client = sockets.telling("::"), sockets.bound("::1")
    index = struct.pack("=i", _LOOPBACK)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, _packed("ff11::53") + index)
    client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, _LOOPBACK)
    try:
        client.sendto(b"all", _at("ff11::53", server))
    except OSError as error:
        pytest.skip(f"this machine has no multicast at its loopback interface: {error.strerror}")
    assert not datagrams.receive(server).is_for_one


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_batch_is_sent_and_received_as_one(sockets: _Sockets, host: str) -> None:
    server = sockets.telling(host)
    client = sockets.connected(server)
    datagrams.receive_batches(client)
    question = bytes(range(250)) * 8
    assert datagrams.send(client, question, 32) == Sent(63)
    arrived = datagrams.receive(server)
    assert (arrived.data, arrived.segment) == (question, 32)
    assert datagrams.send(server, question, 1999, arrived.sender) == Sent(2)
    assert datagrams.receive_connected(client) == (question, 1999)


def test_a_datagram_that_looks_like_a_batch_is_one(sockets: _Sockets) -> None:
    server = sockets.telling("127.0.0.1")
    client = sockets.connected(server)
    datagrams.receive_batches(client)
    assert datagrams.send(client, b"alone", 5) == Sent(1)
    assert datagrams.receive(server)[:2] == (b"alone", 0)
    assert datagrams.send(server, b"alone", 6, client.getsockname()) == Sent(1)
    assert datagrams.receive_connected(client) == (b"alone", 0)


def test_what_cannot_be_sent_as_one_is_sent_one_by_one(sockets: _Sockets) -> None:
    server = sockets.telling("127.0.0.1")
    client = sockets.connected(server)
    client.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
    assert datagrams.send(client, b"abcabcab", 3) == Sent(3)
    assert [datagrams.receive(server)[:2] for _ in range(3)] == [(b"abc", 0), (b"abc", 0), (b"ab", 0)]
    alone = sockets.bound("127.0.0.1")
    alone.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
    control = [datagrams.from_address(alone, _packed("127.0.0.1"))]
    assert datagrams.send(alone, b"abab", 2, server.getsockname(), control) == Sent(2)
    assert [datagrams.receive(server)[:2] for _ in range(2)] == [(b"ab", 0), (b"ab", 0)]


@pytest.mark.parametrize("length", [0, 1, MAX_DATAGRAM_BYTES])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_datagrams_of_any_length_travel_whole(sockets: _Sockets, host: str, length: int) -> None:
    server = sockets.telling(host)
    client = sockets.connected(server)
    assert datagrams.send(client, bytes(length), 0) == Sent(1)
    arrived = datagrams.receive(server)
    assert (len(arrived.data), arrived.segment) == (length, 0)
    assert datagrams.send(server, bytes(length), 0, arrived.sender) == Sent(1)
    assert datagrams.receive_connected(client) == (bytes(length), 0)


def test_what_is_too_long_is_not_sent(sockets: _Sockets) -> None:
    client = sockets.connected(sockets.bound("127.0.0.1"))
    for segment in (0, MAX_DATAGRAM_BYTES + 1):
        sent = datagrams.send(client, bytes(MAX_DATAGRAM_BYTES + 1), segment)
        assert sent.datagrams == 0
        assert sent.problem is not None
        assert sent.problem.errno == errno.EMSGSIZE


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("omits_checksums", [False, True])
def test_a_closed_port_is_heard_of(sockets: _Sockets, host: str, omits_checksums: bool) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind((host, 0))
        client = sockets.connected(gone)
    client.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, omits_checksums)
    assert datagrams.send(client, b"anybody", 0) == Sent(1)
    refused = datagrams.send(client, b"anybody", 3)
    assert refused.datagrams == 0
    assert isinstance(refused.problem, ConnectionRefusedError)
    assert datagrams.send(client, b"anybody", 0) == Sent(1)
    with pytest.raises(ConnectionRefusedError):
        datagrams.receive_connected(client)


def test_of_a_batch_that_ends_in_its_middle_is_told_what_went_out(sockets: _Sockets) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        client = sockets.connected(gone)
    client.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
    count, problem = datagrams.send(client, b"abcd", 1)
    assert count == 1
    assert isinstance(problem, ConnectionRefusedError)


def test_what_the_kernel_has_no_room_for_is_not_sent(sockets: _Sockets) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with here, there:
        here.setblocking(False)
        for _ in range(10_000):
            if datagrams.send(here, bytes(1000), 0) == Sent(0):
                break
        else:
            pytest.fail("the kernel has room without end")


def test_an_address_that_is_not_of_this_host_sends_nothing(sockets: _Sockets) -> None:
    server, client = sockets.bound("0.0.0.0"), sockets.bound("127.0.0.1")
    control = [datagrams.from_address(server, _packed("192.0.2.1"))]
    for segment in (0, 1):
        sent = datagrams.send(server, b"abc", segment, client.getsockname(), control)
        assert sent.datagrams == 0
        assert sent.problem is not None
        assert sent.problem.errno in (errno.EINVAL, errno.ENETUNREACH)  # by what routes there are


def test_nothing_to_receive_is_told_at_once(sockets: _Sockets) -> None:
    server = sockets.telling("127.0.0.1")
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        datagrams.receive(server)
    with pytest.raises(BlockingIOError):
        datagrams.receive_connected(server)


def test_what_the_kernel_lost_for_want_of_room_is_counted(sockets: _Sockets) -> None:
    server = sockets.telling("127.0.0.1")
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    server.setblocking(False)
    client = sockets.bound("127.0.0.1")
    sent = 1000
    for _ in range(sent):
        client.sendto(bytes(100), server.getsockname())
    lost = Lost()
    missing = lost.more(server)
    received = 0
    with suppress(BlockingIOError):
        while datagrams.receive(server):
            received += 1
    assert missing == sent - received > 0
    assert lost.more(server) == 0


@pytest.mark.parametrize(
    ("length", "segment", "datagrams_of"), [(0, 0, 1), (9, 0, 1), (9, 3, 3), (10, 3, 4), (1, 3, 1)]
)
def test_how_many_datagrams_a_batch_has(length: int, segment: int, datagrams_of: int) -> None:
    assert datagrams.count(length, segment) == datagrams_of


def test_all_sockets_of_a_turn_share_what_is_read_in_it_and_each_is_read_once() -> None:
    assert [reads(sockets) for sockets in (0, 1, 2, 5, READS_MAX, 10 * READS_MAX)] == [
        READS_MAX,
        READS_MAX,
        READS_MAX // 2,
        READS_MAX // 5,
        1,
        1,
    ]
