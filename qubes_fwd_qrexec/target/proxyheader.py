# SPDX-License-Identifier: GPL-2.0-or-later
"""The header of the PROXY protocol, versions 1 and 2, by which a server learns who connected.

Between the target's service and the user's server: the first bytes of a connection, in one write, or of
each datagram. It is built from binary fields alone, so nothing that a peer wrote as text gets into it. The
addresses are what the exposed qube says; a server that trusts the header trusts that qube.

An IPv4-mapped IPv6 address counts as IPv4, and a scope is dropped. If one end is IPv4 and the other
IPv6, which no socket has but a lying peer can say, both are written as IPv6, the IPv4 one mapped.
"""

from ipaddress import IPv4Address, IPv6Address
from struct import pack

from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.common.values import IPAddress, unmapped
from qubes_fwd_qrexec.mux import Origin, ProxyVersion

SocketAddress = tuple[IPAddress, int]
"""An address and a port from 0 to 65535."""

# Section 2.2 of the PROXY protocol's text: 12 bytes that no other protocol begins with.
_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_VERSION_2_PROXY = 0x21
_IPV4, _IPV6 = 0x10, 0x20
_STREAM, _DATAGRAM = 1, 2


def header(version: ProxyVersion, origin: Origin) -> bytes:
    """What a server is to get before the first byte of the client; nothing for OFF."""
    if version is ProxyVersion.OFF:
        return b""
    write = header_v1 if version is ProxyVersion.V1 else header_v2
    return write((origin.client, origin.client_port), (origin.exposed, origin.exposed_port))


def datagram_header(version: ProxyVersion, origin: Origin) -> bytes:
    """What a server is to get in front of each datagram; nothing for OFF. Version 1 has none for UDP."""
    if version is ProxyVersion.OFF:
        return b""
    client, exposed = (origin.client, origin.client_port), (origin.exposed, origin.exposed_port)
    return header_v2(client, exposed, _DATAGRAM)


def header_v1(client: SocketAddress, exposed: SocketAddress) -> bytes:
    """One line of ASCII, at most 107 bytes. Raises `TextError` for a port out of range."""
    client_ip, exposed_ip = _same_family(client[0], exposed[0])
    family = "TCP4" if isinstance(client_ip, IPv4Address) else "TCP6"
    return f"PROXY {family} {client_ip} {exposed_ip} {_port(client)} {_port(exposed)}\r\n".encode("ascii")


def header_v2(client: SocketAddress, exposed: SocketAddress, kind: int = _STREAM) -> bytes:
    """28 bytes for IPv4, 52 for IPv6; ``kind`` is 1 for TCP, 2 for UDP. Raises `TextError` for a port out of
    range.
    """
    client_ip, exposed_ip = _same_family(client[0], exposed[0])
    family = (_IPV4 if isinstance(client_ip, IPv4Address) else _IPV6) | kind
    addresses = client_ip.packed + exposed_ip.packed + pack(">HH", _port(client), _port(exposed))
    return _SIGNATURE + pack(">BBH", _VERSION_2_PROXY, family, len(addresses)) + addresses


def _same_family(client: IPAddress, exposed: IPAddress) -> tuple[IPAddress, IPAddress]:
    client, exposed = unmapped(client), unmapped(exposed)
    if client.version == exposed.version:
        return client, exposed
    return _as_ipv6(client), _as_ipv6(exposed)


def _as_ipv6(address: IPAddress) -> IPAddress:
    if isinstance(address, IPv6Address):
        return address
    return IPv6Address(b"\0" * 10 + b"\xff\xff" + address.packed)


def _port(address: SocketAddress) -> int:
    port = address[1]
    if not 0 <= port <= 0xFFFF:
        raise TextError(str(port), "a port from 0 to 65535")
    return port
