# SPDX-License-Identifier: GPL-2.0-or-later
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.mux import Origin, ProxyVersion
from qubes_fwd_qrexec.target import proxyheader
from qubes_fwd_qrexec.target.proxyheader import datagram_header, header_v1, header_v2

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
CLIENT4 = (ip_address("192.0.2.1"), 40000)
EXPOSED4 = (ip_address("198.51.100.2"), 8080)
CLIENT6 = (ip_address("2001:db8::1"), 40000)
EXPOSED6 = (ip_address("2001:db8::2"), 8080)

ports = st.integers(0, 65535)
ends = st.tuples(st.ip_addresses(), ports)


def test_v1_of_two_ipv4_addresses_is_the_line_of_the_specification():
    assert header_v1(CLIENT4, EXPOSED4) == b"PROXY TCP4 192.0.2.1 198.51.100.2 40000 8080\r\n"


def test_v1_of_two_ipv6_addresses_says_tcp6():
    assert header_v1(CLIENT6, EXPOSED6) == b"PROXY TCP6 2001:db8::1 2001:db8::2 40000 8080\r\n"


def test_v2_of_two_ipv4_addresses_has_28_bytes():
    assert header_v2(CLIENT4, EXPOSED4) == SIGNATURE + bytes.fromhex("2111000c c0000201 c6336402 9c40 1f90")


def test_v2_of_two_ipv6_addresses_has_52_bytes():
    addresses = CLIENT6[0].packed + EXPOSED6[0].packed
    assert header_v2(CLIENT6, EXPOSED6) == SIGNATURE + b"\x21\x21\x00\x24" + addresses + b"\x9c\x40\x1f\x90"


@pytest.mark.parametrize(("client", "exposed"), [(CLIENT4, EXPOSED4), (CLIENT6, EXPOSED6)])
def test_in_front_of_a_datagram_is_the_same_header_for_udp(client, exposed):
    origin = Origin(*client, *exposed)
    expected = bytearray(header_v2(client, exposed))
    expected[13] += 1
    assert datagram_header(ProxyVersion.V2, origin) == bytes(expected)
    assert datagram_header(ProxyVersion.OFF, origin) == b""


@pytest.mark.parametrize("header", [header_v1, header_v2])
def test_a_mapped_client_is_tcp4(header):
    mapped = (ip_address("::ffff:192.0.2.1"), 40000)
    assert header(mapped, EXPOSED4) == header(CLIENT4, EXPOSED4)
    assert header(mapped, (ip_address("::ffff:198.51.100.2"), 8080)) == header(CLIENT4, EXPOSED4)


@pytest.mark.parametrize("header", [header_v1, header_v2])
def test_a_scope_is_dropped(header):
    scoped = (ip_address("fe80::1%eth0"), 40000)
    assert header(scoped, EXPOSED6) == header((ip_address("fe80::1"), 40000), EXPOSED6)


def test_mixed_families_are_both_written_as_ipv6():
    line = header_v1(CLIENT4, EXPOSED6)
    assert line.startswith(b"PROXY TCP6 ")
    client, exposed = line.split()[2:4]
    assert IPv6Address(client.decode()).ipv4_mapped == CLIENT4[0]
    assert IPv6Address(exposed.decode()) == EXPOSED6[0]
    assert header_v2(CLIENT6, EXPOSED4)[12:16] == b"\x21\x21\x00\x24"
    assert header_v2(CLIENT6, EXPOSED4)[32:48] == b"\0" * 10 + b"\xff\xff" + EXPOSED4[0].packed


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (ProxyVersion.OFF, b""),
        (ProxyVersion.V1, header_v1(CLIENT4, EXPOSED4)),
        (ProxyVersion.V2, header_v2(CLIENT4, EXPOSED4)),
    ],
)
def test_the_header_of_an_origin_is_of_the_version_that_was_asked_for(version, expected):
    assert proxyheader.header(version, Origin(*CLIENT4, *EXPOSED4)) == expected


@pytest.mark.parametrize("port", [-1, 65536])
@pytest.mark.parametrize("header", [header_v1, header_v2])
def test_an_invalid_port_is_refused(header, port):
    with pytest.raises(TextError, match="a port from 0 to 65535"):
        header(CLIENT4, (EXPOSED4[0], port))


@settings(derandomize=True)
@given(ends, ends)
def test_v1_is_one_short_line_that_reads_back(client, exposed):
    line = header_v1(client, exposed)
    assert len(line) <= 107
    assert line.count(b"\n") == 1
    assert line.endswith(b"\r\n")
    proxy, family, client_ip, exposed_ip, client_port, exposed_port = line[:-2].decode("ascii").split(" ")
    kind = {"TCP4": IPv4Address, "TCP6": IPv6Address}[family]
    kind(client_ip), kind(exposed_ip)
    assert (proxy, int(client_port), int(exposed_port)) == ("PROXY", client[1], exposed[1])


@settings(derandomize=True)
@given(ends, ends)
def test_v2_says_its_own_length(client, exposed):
    header = header_v2(client, exposed)
    assert header.startswith(SIGNATURE)
    assert int.from_bytes(header[14:16], "big") == len(header) - 16
    assert len(header) in (28, 52)
