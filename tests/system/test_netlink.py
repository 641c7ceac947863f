# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests to the kernel and their answers, by a kernel that is written down."""

import errno
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_fwd_qrexec.system.netlink import (
    BATCH,
    InterruptedDumpError,
    Netlink,
    NetlinkError,
    attribute,
    attributes,
    connect,
)

_Answer = tuple[bytes, int]


class FakeKernel:
    """A netlink socket: ``answer`` gets the sequence numbers of each piece that is sent."""

    def __init__(self, answer: Callable[[list[int]], list[_Answer]]) -> None:
        self._answer = answer
        self._waiting: list[_Answer] = []
        self.sent: list[tuple[int, int, bytes]] = []
        self.pieces = 0
        self.is_closed = False

    def sendto(self, data: bytes, address: tuple[int, int], /) -> int:
        assert address == (0, 0)
        self.pieces += 1
        numbers, at = [], 0
        while at < len(data):
            length, kind, flags, number, port = struct.unpack_from("=IHHII", data, at)
            assert port == 0
            numbers.append(number)
            self.sent.append((kind, flags, data[at + 16 : at + length]))
            at += (length + 3) & ~3
        self._waiting += self._answer(numbers)
        return len(data)

    def recvfrom(self, size: int, /) -> tuple[bytes, tuple[int, int]]:
        if not self._waiting:
            raise TimeoutError("timed out")
        said, sender = self._waiting.pop(0)
        assert len(said) <= size
        return said, (sender, 0)

    def close(self) -> None:
        self.is_closed = True


def message(kind: int, number: int, payload: bytes = b"", *, flags: int = 0) -> bytes:
    data = struct.pack("=IHHII", 16 + len(payload), kind, flags, number, 0) + payload
    return data.ljust((len(data) + 3) & ~3, b"\0")


def status(number: int, error: int = 0, *, kind: int = 2, flags: int = 0) -> bytes:
    return message(kind, number, struct.pack("=i", -error), flags=flags)


def dumped(*answers: Callable[[int], bytes], sender: int = 0) -> FakeKernel:
    return FakeKernel(lambda numbers: [(answer(numbers[0]), sender) for answer in answers])


def test_a_list_comes_in_several_parts_until_it_is_said_to_be_done() -> None:
    kernel = dumped(
        lambda n: message(20, n, b"one") + message(20, n, b"two!"),
        lambda n: message(20, n, b"three") + status(n, kind=3) + message(20, n, b"more"),
    )
    with Netlink(kernel) as netlink:
        assert list(netlink.dump(20, b"what")) == [b"one", b"two!", b"three"]
    assert kernel.sent == [(20, 0x301, b"what")]
    assert kernel.is_closed


def test_what_is_no_answer_to_this_request_is_not_taken_for_one() -> None:
    """Neither what is left of an earlier one, nor what another program sends."""
    late = dumped(lambda n: status(n - 1, kind=3) + message(20, n, b"mine") + status(n, kind=3))
    assert list(Netlink(late).dump(20, b"")) == [b"mine"]
    foreign = dumped(lambda n: message(20, n, b"theirs") + status(n, kind=3), sender=4711)
    with pytest.raises(NetlinkError, match="timed out"):
        list(Netlink(foreign).dump(20, b""))


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_list_that_has_changed_meanwhile_says_so_after_all_it_has(where: int) -> None:
    flags = [0x10 if where == at else 0 for at in range(3)]
    kernel = dumped(
        lambda n: message(20, n, b"one", flags=flags[0]) + message(20, n, b"two", flags=flags[1]),
        lambda n: status(n, kind=3, flags=flags[2]),
    )
    found = []
    with pytest.raises(InterruptedDumpError):
        found.extend(Netlink(kernel).dump(20, b""))
    messages = Netlink(kernel).dump(20, b"")
    assert [next(messages), next(messages)] == [b"one", b"two"]


@pytest.mark.parametrize("kind", [2, 3])
def test_a_list_that_ends_with_an_error_is_none(kind: int) -> None:
    kernel = dumped(lambda n: message(20, n, b"one") + status(n, errno.ENOMEM, kind=kind))
    with pytest.raises(NetlinkError, match="Cannot allocate memory"):
        list(Netlink(kernel).dump(20, b""))


@pytest.mark.parametrize(
    "answer",
    [
        lambda n: message(20, n, b"x" * 9)[:-4],
        lambda n: b"\0" * 16,
        lambda n: b"x",
        lambda n: message(20, n) + struct.pack("=IHHII", 15, 3, 0, n, 0),
        lambda n: message(3, n, b"\0\0\0"),
    ],
)
def test_half_a_message_is_an_error(answer: Callable[[int], bytes]) -> None:
    with pytest.raises(NetlinkError, match="an answer is cut short"):
        list(Netlink(dumped(answer)).dump(20, b""))


def test_requests_are_made_some_at_a_time_and_each_has_its_own_success() -> None:
    """In whatever order the kernel answers."""
    kernel = FakeKernel(
        lambda numbers: [(status(n, errno.ENOENT if n % 3 == 0 else 0), 0) for n in reversed(numbers)]
    )
    netlink = Netlink(kernel)
    count = 2 * BATCH + 1
    statuses = netlink.ask(258, [b"%d" % n for n in range(1, count + 1)])
    assert statuses == [errno.ENOENT if n % 3 == 0 else 0 for n in range(1, count + 1)]
    assert kernel.sent == [(258, 0x5, b"%d" % n) for n in range(1, count + 1)]
    assert kernel.pieces == 3
    assert netlink.ask(258, []) == []


def test_no_answer_to_one_of_the_requests_is_an_error() -> None:
    kernel = FakeKernel(lambda numbers: [(status(n), 0) for n in numbers[:-1]])
    with pytest.raises(NetlinkError, match="timed out"):
        Netlink(kernel).ask(258, [b"one", b"two"])


def test_a_socket_that_fails_is_an_error() -> None:
    class Broken(FakeKernel):
        def sendto(self, data: bytes, address: tuple[int, int], /) -> int:
            raise OSError(errno.ENOBUFS, "No buffer space available")

    with pytest.raises(NetlinkError, match="No buffer space"):
        Netlink(Broken(lambda _: [])).ask(258, [b""])
    with pytest.raises(NetlinkError):
        connect(31)  # linux/netlink.h: one less than MAX_LINKS, unused


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=40), max_size=8), st.booleans())
def test_attributes_read_as_they_are_written(values: dict[int, bytes], is_nested: bool) -> None:
    written = b"".join(attribute(kind, value, is_nested=is_nested) for kind, value in values.items())
    assert attributes(b"head" + written, 4) == values


@given(st.binary(max_size=60))
def test_whatever_bytes_there_are_is_attributes_or_an_error(data: bytes) -> None:
    try:
        found = attributes(data)
    except NetlinkError:
        return
    assert sum(4 + len(value) for value in found.values()) <= len(data)


@given(st.binary(max_size=80))
def test_whatever_bytes_come_is_a_list_or_an_error(data: bytes) -> None:
    with suppress(NetlinkError):
        list(Netlink(dumped(lambda _: data, lambda n: status(n, kind=3))).dump(20, b""))


@pytest.mark.parametrize(
    "data",
    [attribute(1, b"12345")[:-4], struct.pack("=HH", 3, 1), b"\0\0", struct.pack("=HH", 0, 0)],
)
def test_half_an_attribute_is_an_error(data: bytes) -> None:
    with pytest.raises(NetlinkError, match="an attribute is cut short"):
        attributes(data)


def test_the_kernel_answers() -> None:
    """NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, UNIX sockets: linux/unix_diag.h; any user may ask."""
    ours, theirs = socket.socketpair()
    with ours, theirs, connect(4) as netlink:
        request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, 0, 0, 0)
        inodes = {struct.unpack_from("=I", found, 4)[0] for found in netlink.dump(20, request)}
        assert {os.fstat(ours.fileno()).st_ino, os.fstat(theirs.fileno()).st_ino} <= inodes
        assert netlink.ask(99, [b"\0\0"]) == [errno.EINVAL]
