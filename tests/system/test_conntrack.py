# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections that a qube passes on: how entries are read, and that the kernel deletes exactly those."""

import errno
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from ipaddress import ip_address

import pytest
from bounds import BOUND_S
from hypothesis import given
from hypothesis import strategies as st
from spaces import Spaces, needs_namespaces

from qubes_fwd_qrexec.system.conntrack import Connection, ConntrackError, delete, dump_request, parse
from qubes_fwd_qrexec.system.netlink import BATCH, Netlink, NetlinkError, attribute

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
# linux/netfilter/nf_conntrack_common.h: IPS_SEEN_REPLY, and IPS_DST_NAT beside it.
PLAIN, SENT_ON = 0x2, 0x22


def tuple_of(version: int, source: str, destination: str, protocol: int, *ports: int) -> bytes:
    """As linux/netfilter/nfnetlink_conntrack.h lays it out."""
    first = 1 if version == 4 else 3
    packed = [ip_address(text).packed for text in (source, destination)]
    addresses = attribute(first, packed[0]) + attribute(first + 1, packed[1])
    protocols = attribute(1, bytes([protocol]))
    protocols += b"".join(attribute(2 + at, struct.pack("!H", port)) for at, port in enumerate(ports))
    return attribute(1, addresses, is_nested=True) + attribute(2, protocols, is_nested=True)


def entry(
    source_port: int = 40000,
    port: int = 80,
    *,
    status: int = SENT_ON,
    protocol: int = TCP,
    zone: bytes = b"",
    number: int = 77,
    version: int = 4,
) -> bytes:
    """From 192.0.2.9 to ``port`` of 192.0.2.1, sent on to port 8080 of 10.137.0.5; or the same by IPv6."""
    here = ("192.0.2.9", "192.0.2.1", "10.137.0.5") if version == 4 else ("fd77::9", "fd77::1", "fd09::5")
    client, edge, server = here
    return (
        struct.pack("=BBH", socket.AF_INET if version == 4 else socket.AF_INET6, 0, 0)
        + attribute(1, tuple_of(version, client, edge, protocol, source_port, port), is_nested=True)
        + attribute(2, tuple_of(version, server, client, protocol, 8080, source_port), is_nested=True)
        + attribute(3, struct.pack("!I", status))
        + zone
        + attribute(12, struct.pack("!I", number))
    )


@pytest.mark.parametrize("version", [4, 6])
def test_an_entry_tells_both_ends_and_who_answers(version: int) -> None:
    found = parse(version, entry(version=version))
    assert found is not None
    client, edge, server = (
        ("192.0.2.9", "192.0.2.1", "10.137.0.5") if version == 4 else ("fd77::9", "fd77::1", "fd09::5")
    )
    assert (found.source, found.destination, found.answerer) == tuple(map(ip_address, (client, edge, server)))
    assert (found.protocol, found.source_port, found.destination_port) == (TCP, 40000, 80)
    assert found.answerer_port == 8080
    assert found.is_sent_on


def test_what_is_to_be_deleted_is_named_by_its_tuple_its_zone_and_its_id() -> None:
    zone = attribute(18, b"\0\7")
    found = parse(4, entry(zone=zone))
    assert found is not None
    original = attribute(1, tuple_of(4, "192.0.2.9", "192.0.2.1", TCP, 40000, 80), is_nested=True)
    head, number = struct.pack("=BBH", socket.AF_INET, 0, 0), attribute(12, struct.pack("!I", 77))
    assert found.request == head + original + number + zone
    other = parse(4, entry())
    assert other is not None
    assert other.request == head + original + number


def test_an_entry_of_another_protocol_or_family_is_none_of_ours() -> None:
    assert parse(4, entry(protocol=socket.IPPROTO_ICMP)) is None
    assert parse(4, entry(version=6)) is None
    plain = parse(4, entry(status=PLAIN, protocol=UDP))
    assert plain is not None
    assert not plain.is_sent_on


def without(kind: int) -> bytes:
    """An entry that lacks one attribute."""
    data = entry()
    at = 4
    while True:
        length, found = struct.unpack_from("=HH", data, at)
        size = (length + 3) & ~3
        if found & 0x3FFF == kind:
            return data[:at] + data[at + size :]
        at += size


@pytest.mark.parametrize(
    "data",
    [
        *(without(kind) for kind in (1, 2, 3, 12)),
        b"",
        b"\2\0\0\0",
        entry()[:-1],
        struct.pack("=BBH", 2, 0, 0) + attribute(1, b""),
        entry()
        .replace(ip_address("10.137.0.5").packed, b"\0\0\0\0", 1)
        .replace(b"\x08\0\1\0", b"\x08\0\3\0"),
        entry().replace(struct.pack("=HH", 6, 3) + struct.pack("!H", 80), struct.pack("=HH", 5, 3) + b"PP"),
        entry().replace(struct.pack("=HH", 8, 3), struct.pack("=HH", 7, 3)),
    ],
)
def test_what_is_no_entry_is_an_error(data: bytes) -> None:
    with pytest.raises(NetlinkError):
        parse(4, data)


@given(st.integers(0, len(entry())), st.binary(max_size=6))
def test_whatever_bytes_there_are_is_an_entry_or_an_error(at: int, change: bytes) -> None:
    data = entry()
    with suppress(NetlinkError):
        parse(4, data[:at] + change + data[at + len(change) :])


class Table:
    """A kernel's table of connections, whose list may be said to be interrupted so many times."""

    def __init__(self, *entries: bytes, interruptions: int = 0, refusal: int = 0) -> None:
        self.entries = list(entries)
        self.interruptions = interruptions
        self.refusal = refusal
        self.lists = 0
        self.is_full = False
        """Whether there are always new ones."""

    def netlink(self) -> Netlink:
        return Netlink(_TableSocket(self))

    def answers(self, kind: int, number: int, request: bytes) -> Iterator[bytes]:
        if kind == 0x101:
            self.lists += 1
            flags = 0x10 if self.interruptions > 0 else 0
            self.interruptions -= 1
            for one in self.entries:
                yield self._message(0x100, number, one)
            yield self._message(3, number, bytes(4), flags)
        else:
            assert kind == 0x102
            found = [one for one in self.entries if self._request(one) == request]
            status = self.refusal or (0 if found else errno.ENOENT)
            if not status and not self.is_full:
                self.entries.remove(found[0])
            yield self._message(2, number, struct.pack("=i", -status))

    def _message(self, kind: int, number: int, payload: bytes, flags: int = 0) -> bytes:
        return struct.pack("=IHHII", 16 + len(payload), kind, flags, number, 0) + payload

    def _request(self, one: bytes) -> bytes:
        found = parse(4, one)
        return b"" if found is None else found.request


class _TableSocket:
    def __init__(self, table: Table) -> None:
        self._table = table
        self._waiting: list[bytes] = []

    def sendto(self, data: bytes, address: tuple[int, int], /) -> int:
        at = 0
        while at < len(data):
            length, kind, _, number, _ = struct.unpack_from("=IHHII", data, at)
            self._waiting += self._table.answers(kind, number, data[at + 16 : at + length])
            at += (length + 3) & ~3
        return len(data)

    def recvfrom(self, size: int, /) -> tuple[bytes, tuple[int, int]]:
        return self._waiting.pop(0), (0, 0)

    def close(self) -> None:
        pass


def everything(_: Connection) -> bool:
    return True


def test_a_list_is_read_anew_until_it_has_nothing_more_and_was_whole() -> None:
    table = Table(entry(1), entry(2), interruptions=2)
    assert delete(4, everything, sent_on=True, kernel=table.netlink) == 2
    assert (table.entries, table.lists) == ([], 3)
    table = Table(entry(1), interruptions=99)
    with pytest.raises(ConntrackError, match="as fast as they are deleted, 1 by now"):
        delete(4, everything, sent_on=True, kernel=table.netlink)


def test_more_than_are_deleted_at_a_time_are_all_deleted() -> None:
    table = Table(*(entry(port, number=port) for port in range(1, 2 * BATCH + 2)))
    assert delete(4, everything, sent_on=True, kernel=table.netlink) == 2 * BATCH + 1
    assert table.entries == []


def test_connections_that_come_as_fast_as_they_go_do_not_keep_it_for_ever() -> None:
    table = Table(entry())
    table.is_full = True
    with pytest.raises(ConntrackError, match="as fast as they are deleted"):
        delete(4, everything, sent_on=True, kernel=table.netlink)
    assert table.lists < 10


def test_one_that_the_kernel_keeps_does_not_save_the_others() -> None:
    table = Table(*(entry(port, number=port) for port in range(1, BATCH + 2)), refusal=errno.EBUSY)
    asked: list[Connection] = []

    def note(connection: Connection) -> bool:
        asked.append(connection)
        return True

    with pytest.raises(ConntrackError, match="Device or resource busy"):
        delete(4, note, sent_on=True, kernel=table.netlink)
    assert len(asked) == BATCH + 1


def test_one_that_has_ended_by_itself_is_no_failure() -> None:
    table = Table(entry(), refusal=errno.ENOENT)

    def last(_: Connection) -> bool:
        return table.lists == 1

    assert delete(4, last, sent_on=True, kernel=table.netlink) == 0


def test_only_what_is_wanted_and_of_the_wanted_kind_is_deleted() -> None:
    def one(connection: Connection) -> bool:
        return connection.request == wanted

    entries = [entry(1), entry(2), entry(3, status=PLAIN), entry(4, protocol=1)]
    found = parse(4, entries[0])
    assert found is not None
    wanted = found.request
    table = Table(*entries)
    assert delete(4, one, sent_on=True, kernel=table.netlink) == 1
    assert table.entries == entries[1:]
    assert delete(4, everything, sent_on=False, kernel=table.netlink) == 1
    assert table.entries == [entries[1], entries[3]]


@pytest.mark.parametrize("more", [0, 100])
def test_only_what_came_to_one_of_some_ports_is_looked_at(more: int) -> None:
    """Few are sought in an entry before it is parsed, wherever they are there; the others are not."""
    # The client of the second one comes from a port that is sought.
    table = Table(entry(port=1, number=1), entry(3, port=2, number=2), entry(port=3, number=3))
    asked: list[int] = []

    def note(connection: Connection) -> bool:
        asked.append(connection.destination_port)
        return True

    ports = {1, 3, 8080, *range(1000, 1000 + more)}
    assert delete(4, note, sent_on=True, ports=ports, kernel=table.netlink) == 2
    assert asked == [1, 3]
    assert delete(4, note, sent_on=True, ports=(), kernel=table.netlink) == 0
    assert len(table.entries) == 1


def test_what_was_begun_from_one_of_the_ports_is_looked_at_if_it_is_not_sent_on() -> None:
    table = Table(entry(53, port=1, number=1, status=PLAIN), entry(54, port=2, number=2, status=PLAIN))
    assert delete(4, everything, sent_on=False, ports={53}, kernel=table.netlink) == 1
    assert [found.source_port for found in map(partial(parse, 4), table.entries) if found] == [54]


def test_the_kernel_is_asked_for_the_wanted_kind_alone() -> None:
    asked = dump_request(6, sent_on=True)
    assert asked[:4] == struct.pack("=BBH", socket.AF_INET6, 0, 0)
    assert asked[4:] == attribute(3, b"\0\0\0\x20") + attribute(26, b"\0\0\0\x20")
    assert dump_request(4, sent_on=False)[4:] == attribute(3, bytes(4)) + attribute(26, b"\0\0\0\x20")


@needs_namespaces
@pytest.mark.parametrize("version", [4, 6])
def test_the_kernel_deletes_exactly_these(version: int) -> None:
    """A router sends 80 on to 8080 of the server, and passes on what is for the server itself."""
    edge, client, inner, server, size, family = {
        4: ("192.0.2.1", "192.0.2.9", "198.51.100.1", "198.51.100.2", 24, "ip"),
        6: ("fd77::1", "fd77::9", "fd09::1", "fd09::2", 64, "ip6"),
    }[version]
    kind = socket.AF_INET if version == 4 else socket.AF_INET6
    to = server if version == 4 else f"[{server}]"
    with Spaces("client", "router", "server") as spaces:
        spaces.join("router", "client", (f"{edge}/{size}", f"{client}/{size}"))
        spaces.join("router", "server", (f"{inner}/{size}", f"{server}/{size}"))
        spaces.forward_packets("router")
        for name, gateway in (("client", edge), ("server", inner)):
            spaces.ip_in(name, "route", "add", "default", "via", gateway)
        spaces.run(
            "router",
            *("nft", "-f", "-"),
            text=f"""table {family} t {{
                chain pre {{ type nat hook prerouting priority dstnat;
                {family} daddr {edge} tcp dport 80 dnat to {to}:8080
                {family} daddr {edge} tcp dport 81 dnat to {to}:8081
                {family} daddr {edge} udp dport 80 dnat to {to}:8080
            }}
            }}""",
        )
        with spaces.within("server"):
            servers = [socket.create_server((server, port), family=kind) for port in (8080, 8081)]
        opened: list[socket.socket] = list(servers)
        try:
            with spaces.within("client"):
                for address, port in ((edge, 80), (edge, 80), (edge, 81), (server, 8080)):
                    opened.append(socket.create_connection((address, port), timeout=BOUND_S))
                datagrams = socket.socket(kind, socket.SOCK_DGRAM)
                opened.append(datagrams)
                datagrams.sendto(b"x", (edge, 80))

            def unwanted(connection: Connection) -> bool:
                ports = connection.destination_port, connection.answerer_port
                seen.append(connection)
                return connection.protocol == TCP and ports == (80, 8080)

            with spaces.within("router"):
                seen: list[Connection] = []
                assert delete(version, unwanted, sent_on=True) == 2
                assert {(one.source, one.destination, one.answerer) for one in seen} == {
                    (ip_address(client), ip_address(edge), ip_address(server))
                }
                assert not [one for one in seen if not one.is_sent_on]
                kept: list[tuple[int, int]] = []
                assert delete(version, lambda c: bool(kept.append(ports_of(c))), sent_on=True) == 0
                assert sorted(kept) == [(TCP, 81), (UDP, 80)]
                kept.clear()
                assert delete(version, lambda c: bool(kept.append(ports_of(c))), sent_on=False) == 0
                assert kept == [(TCP, 8080)]
                other = 10 - version
                assert delete(other, everything, sent_on=True) == 0
        finally:
            for sock in opened:
                sock.close()


def ports_of(connection: Connection) -> tuple[int, int]:
    return connection.protocol, connection.destination_port


@needs_namespaces
def test_without_the_right_the_kernel_refuses_and_it_is_an_error() -> None:
    """Of all rights it needs CAP_NET_ADMIN alone; in a child, as a right that is given up is gone."""
    code = (
        "import sys, ctypes, struct\n"
        "from qubes_fwd_qrexec.system import conntrack\n"
        "def keep(rights):\n"
        "    header = struct.pack('=Ii', 0x20080522, 0)\n"
        "    data = struct.pack('=6I', rights, rights, 0, 0, 0, 0)\n"
        "    assert ctypes.CDLL(None).capset(header, data) == 0\n"
        "keep(1 << 12)\n"
        "print(conntrack.delete(4, lambda _: True, sent_on=True))\n"
        "keep(0)\n"
        "try:\n"
        "    conntrack.delete(4, lambda _: True, sent_on=True)\n"
        "except conntrack.ConntrackError as error:\n"
        "    print(error)\n"
    )
    with Spaces("one") as spaces:
        said = spaces.run("one", sys.executable, "-c", code)
    assert said.splitlines() == ["0", "the kernel does not delete connections: Operation not permitted"]


@needs_namespaces
def test_the_kernel_deletes_many_in_several_batches() -> None:
    count = 3 * BATCH + 1
    with Spaces("client", "router") as spaces, ExitStack() as opened:
        spaces.join("router", "client", ("192.0.2.1/24", "192.0.2.9/24"))
        rule = "udp dport 80 dnat to 192.0.2.1:8080"
        chain = f"chain pre {{\ntype nat hook prerouting priority dstnat;\n{rule}\n}}\n"
        spaces.run("router", "nft", "-f", "-", text=f"table ip t {{\n{chain}}}\n")
        with spaces.within("router"):
            server = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            server.bind(("192.0.2.1", 8080))
            server.settimeout(BOUND_S)
        with spaces.within("client"):
            for _ in range(count):
                client = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                client.sendto(b"x", ("192.0.2.1", 80))
                server.recv(1)  # so that the kernel has made its entry
        with spaces.within("router"):
            assert delete(4, everything, sent_on=True) == count
            assert delete(4, everything, sent_on=True) == 0
