# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a forward listens, whom it allows, and what it says last."""

import socket
from ipaddress import IPv4Address, ip_address

import pytest
from udp_clients import free_udp_port

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.values import IPAddress
from qubes_fwd_qrexec.exposed.openports import allows, bindings, last_said, open_all, places
from qubes_fwd_qrexec.exposed.udpport import open_udp
from qubes_fwd_qrexec.relay.acceptloop import BindError


def config(listen: str = "127.0.0.1,127.0.0.2") -> ListenerConfig:
    return ListenerConfig.parse(
        "fwd.work.web",
        f"version=1 service=qubes.ForwardTCP transport=call side=outer listen={listen} "
        "srcports=80-81 dstports=8080-8081 srchosts=192.0.2.0/24",
    )


def test_a_forward_listens_on_every_address_and_port() -> None:
    addresses = IPv4Address("127.0.0.1"), IPv4Address("127.0.0.2")
    assert bindings(config()) == {(address, port) for address in addresses for port in (80, 81)}
    assert places(config()) == "127.0.0.1:80-81, 127.0.0.2:80-81"


@pytest.mark.parametrize(
    ("listen", "client", "address", "port", "target_port", "is_allowed"),
    [
        ("127.0.0.1", "192.0.2.1", "127.0.0.1", 81, 8081, True),
        ("0.0.0.0", "192.0.2.1", "127.0.0.1", 81, 8081, True),
        ("127.0.0.1", "198.51.100.1", "127.0.0.1", 81, 8081, False),
        ("127.0.0.1", "192.0.2.1", "127.0.0.2", 81, 8081, False),
        ("0.0.0.0", "192.0.2.1", "::1", 81, 8081, False),
        ("127.0.0.1", "192.0.2.1", "127.0.0.1", 82, 8082, False),
        ("127.0.0.1", "192.0.2.1", "127.0.0.1", 81, 8080, False),
    ],
)
def test_who_is_allowed(
    listen: str, client: str, address: str, port: int, target_port: int, *, is_allowed: bool
) -> None:
    found = allows(config(listen), ip_address(client), (ip_address(address), port), target_port)
    assert found is is_allowed


def test_all_ports_are_opened_or_none() -> None:
    opened: list[socket.socket] = []

    def open_one(address: IPAddress, port: int) -> socket.socket:
        opened.append(open_udp(address, port))
        return opened[-1]

    here, port = ip_address("127.0.0.1"), free_udp_port()
    with pytest.raises(BindError):
        open_all([(here, port), (ip_address("192.0.2.1"), port)], open_one)
    assert [sock.fileno() for sock in opened] == [-1]
    for sock in open_all([(here, port)], open_one).values():
        sock.close()


def test_the_latest_error_is_said() -> None:
    assert last_said(None, None) == (None, None)
    assert last_said(("older", 1.0), None, ("newer\n", 2.5)) == ("newer\\n", 2)
