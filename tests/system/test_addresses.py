# SPDX-License-Identifier: GPL-2.0-or-later
"""The addresses of a qube: as the kernel has them, and what becomes of a list that is not whole."""

import socket
import struct
from collections.abc import Callable
from ipaddress import ip_address

import pytest
from spaces import Spaces, needs_namespaces

from qubes_fwd_qrexec.system.addresses import AddressesError, local_addresses, routed_by
from qubes_fwd_qrexec.system.netlink import Netlink, attribute

# linux/netlink.h: a header's flags, NLMSG_DONE; linux/rtnetlink.h: RTM_NEWADDR.
MULTI, CHANGED, DONE, NEW_ADDRESS = 0x2, 0x10, 3, 20


def message(kind: int, payload: bytes, flags: int = MULTI) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, 1, 0) + payload


def entry(*attributes: bytes, flags: int = MULTI) -> bytes:
    head = struct.pack("=BBBBI", socket.AF_INET, 24, 0, 0, 2)
    return message(NEW_ADDRESS, head + b"".join(attributes), flags)


def packed(kind: int, text: str) -> bytes:
    return attribute(kind, ip_address(text).packed)


END = message(DONE, struct.pack("=i", 0))


class FakeKernel:
    """Answers the next request with the next list."""

    def __init__(self, answers: list[bytes]) -> None:
        self._answers = answers

    def sendto(self, data: bytes, address: tuple[int, int], /) -> int:
        assert struct.unpack_from("=IHH", data) == (24, 22, 0x301)  # RTM_GETADDR, a request for all
        return len(data)

    def recvfrom(self, size: int, /) -> tuple[bytes, tuple[int, int]]:
        return self._answers.pop(0), (0, 0)

    def close(self) -> None:
        pass


def kernel(*answers: bytes) -> Callable[[], Netlink]:
    left = list(answers)
    return lambda: Netlink(FakeKernel(left))


@needs_namespaces
def test_all_addresses_of_a_family_are_there_whatever_interface_has_them() -> None:
    with Spaces("one", "two") as spaces:
        spaces.join("one", "two", ("192.0.2.1/24", "192.0.2.2/24"), ("fd77::1/64", "fd77::2/64"))
        with spaces.within("one"):
            v4, v6 = local_addresses(4), local_addresses(6)
    assert v4 == {ip_address("127.0.0.1"), ip_address("192.0.2.1")}
    assert {ip_address("::1"), ip_address("fd77::1")} <= v6
    assert {address.version for address in v6} == {6}


@needs_namespaces
def test_the_single_addresses_that_have_a_route_by_a_group_are_those_of_the_qubes_behind() -> None:
    with Spaces("one", "two") as spaces:
        spaces.join("one", "two", ("192.0.2.1/24", "192.0.2.2/24"), ("fd77::1/64", "fd77::2/64"))
        for to in ("10.137.0.9", "10.137.1.0/24", "fd09::9"):
            spaces.ip_in("one", "route", "add", to, "dev", "two")
        with spaces.within("one"):
            assert routed_by(4, 2) == frozenset()
            assert ip_address("10.137.0.9") in routed_by(4, 0)
        spaces.ip_in("one", "link", "set", "two", "group", "2")
        with spaces.within("one"):
            assert ip_address("10.137.0.9") in routed_by(4, 2)
            assert ip_address("fd09::9") in routed_by(6, 2)
            assert not {ip_address("10.137.1.0"), ip_address("127.0.0.1")} & routed_by(4, 2)
            assert ip_address("10.137.0.9") not in routed_by(4, 0)


def test_of_a_link_between_two_the_end_here_counts() -> None:
    found = local_addresses(4, kernel(entry(packed(1, "192.0.2.9"), packed(2, "192.0.2.1")) + END))
    assert found == {ip_address("192.0.2.1")}
    assert local_addresses(6, kernel(entry(packed(1, "fd77::1")) + END)) == {ip_address("fd77::1")}


def test_a_list_that_has_changed_meanwhile_is_read_again() -> None:
    changed, whole = (entry(packed(2, "192.0.2.1"), flags=flags) + END for flags in (MULTI | CHANGED, MULTI))
    assert local_addresses(4, kernel(changed, whole)) == {ip_address("192.0.2.1")}
    with pytest.raises(AddressesError, match="has changed while it was read"):
        local_addresses(4, kernel(*[changed] * 9))


@pytest.mark.parametrize("attributes", [(), (attribute(2, b"abc"),), (b"\1\0\2\0",)])
def test_what_has_no_address_is_an_error(attributes: tuple[bytes, ...]) -> None:
    with pytest.raises(AddressesError, match="the kernel does not list its addresses"):
        local_addresses(4, kernel(entry(*attributes) + END))
