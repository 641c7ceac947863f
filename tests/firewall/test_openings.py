# SPDX-License-Identifier: GPL-2.0-or-later
"""What is open to the listener as values. `test_flows` has the packets."""

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from qubes_fwd_qrexec.common.config import ListenerConfig, Side
from qubes_fwd_qrexec.common.rules import OnExpire
from qubes_fwd_qrexec.common.values import PortRange, Proto, Sources
from qubes_fwd_qrexec.firewall.openings import Flows, Opening, openings
from qubes_fwd_qrexec.firewall.pathrules import DRAIN_MAX_S
from qubes_fwd_qrexec.system.conntrack import Connection

EVERYWHERE = Opening(
    key="udp.work.dns",
    proto=Proto.UDP,
    side=Side.OUTER,
    address=ip_address("0.0.0.0"),
    ports=PortRange(50, 59),
    sources=Sources.parse("192.0.2.0/24"),
)
AT_ONE = replace(EVERYWHERE, address=ip_address("198.51.100.1"))
DNS = ListenerConfig.parse(
    "udp.work.dns",
    "version=1 service=qubes.ForwardUDP transport=mux side=outer listen=0.0.0.0,:: "
    "srcports=50-59 dstports=50-59 srchosts=192.0.2.0/24,fd77::/64",
)
WEB = ListenerConfig.parse(
    "fwd.work.web",
    "version=1 service=qubes.ForwardTCP transport=mux side=outer listen=0.0.0.0 "
    "srcports=80 dstports=80 srchosts=any",
)


def test_an_opening_is_as_long_as_the_listener_listens_at_one_address() -> None:
    listening = {(Proto.UDP, DNS.listen[0], port) for port in (50, 51, 53, 59)}
    listening |= {(Proto.TCP, DNS.listen[0], 52)} | {
        (Proto.UDP, DNS.listen[1], port) for port in range(1, 99)
    }
    found = [(opening.address, str(opening.ports)) for opening in openings(DNS, listening)]
    v4, v6 = DNS.listen
    assert found == [(v4, "50-51"), (v4, "53-53"), (v4, "59-59"), (v6, "50-59")]
    assert [(opening.address, str(opening.ports)) for opening in openings(DNS)] == [
        (v4, "50-59"),
        (v6, "50-59"),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"proto": Proto.TCP},
        {"side": Side.VIFS},
        {"address": ip_address("::")},
        {"address": ip_address("198.51.100.2")},
        {"ports": PortRange(51, 59)},
        {"ports": PortRange(50, 58)},
        {"sources": Sources.parse("192.0.2.0/25")},
    ],
)
def test_one_covers_another_only_if_nothing_is_missing(changes: dict[str, Any]) -> None:
    assert AT_ONE.covers(AT_ONE)
    assert not replace(AT_ONE, **changes).covers(AT_ONE)


def test_a_wider_one_covers_a_narrower_one() -> None:
    wider = {"ports": PortRange(1, 99), "sources": Sources.parse("any"), "key": "udp.work.other"}
    assert EVERYWHERE.covers(AT_ONE)
    assert not AT_ONE.covers(EVERYWHERE)
    assert replace(EVERYWHERE, **wider).covers(AT_ONE)


def flow(source: str, source_port: int, destination: str, destination_port: int) -> Connection:
    return Connection(
        protocol=17,
        source=ip_address(source),
        source_port=source_port,
        destination=ip_address(destination),
        destination_port=destination_port,
        answerer=ip_address(destination),
        answerer_port=destination_port,
        is_sent_on=False,
        request=b"",
    )


@pytest.mark.parametrize(
    ("source", "source_port", "destination", "destination_port", "is_of"),
    [
        ("192.0.2.9", 4000, "198.51.100.1", 53, (EVERYWHERE, AT_ONE)),
        ("192.0.2.9", 4000, "198.51.100.2", 53, (EVERYWHERE,)),
        ("192.0.3.9", 4000, "198.51.100.1", 53, ()),
        ("192.0.2.9", 4000, "198.51.100.1", 60, ()),
        ("198.51.100.1", 53, "192.0.2.9", 4000, (EVERYWHERE, AT_ONE)),  # the answer was too late
        ("198.51.100.1", 4000, "192.0.2.9", 53, ()),
    ],
)
def test_a_flow_is_an_openings_by_client_and_port_whoever_has_begun_it(
    source: str, source_port: int, destination: str, destination_port: int, is_of: tuple[Opening, ...]
) -> None:
    found = flow(source, source_port, destination, destination_port)
    assert tuple(opening for opening in (EVERYWHERE, AT_ONE) if opening.has(found)) == is_of


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


DRAINING = replace(DNS, on_expire=OnExpire.DRAIN)


def test_flows_go_on_while_their_forward_is_active_and_those_of_tcp_are_none() -> None:
    flows = Flows()
    assert flows.look([DNS, WEB]) == {DNS}
    assert flows.look([WEB]) == set()


def test_what_drains_goes_on_for_an_hour_whatever_replaces_it() -> None:
    clock = Clock()
    flows = Flows(clock=clock)
    narrower = replace(DRAINING, sources=Sources.parse("192.0.2.0/25"))
    assert flows.look([DRAINING]) == {DRAINING}
    assert flows.look([narrower]) == {DRAINING, narrower}
    clock.now_s += DRAIN_MAX_S - 1
    assert flows.look([]) == {DRAINING, narrower}
    clock.now_s += 1
    assert flows.look([]) == {narrower}
    assert flows.look([narrower]) == {narrower}
    clock.now_s += DRAIN_MAX_S
    assert flows.look([narrower]) == {narrower}


def test_what_replaces_a_forward_says_whether_its_flows_are_cut() -> None:
    flows = Flows()
    flows.look([DRAINING])
    assert flows.look([DNS]) == {DNS}


def test_what_an_earlier_run_has_left_drains_or_is_cut_as_it_says() -> None:
    assert Flows([DNS]).look([]) == set()
    assert Flows([DRAINING]).look([]) == {DRAINING}
