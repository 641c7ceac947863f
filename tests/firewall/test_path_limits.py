# SPDX-License-Identifier: GPL-2.0-or-later
"""A forward by nft along a path of qubes: its limits, and what it counts."""

import time

import pytest
from bounds import BOUND_S
from test_path import ANSWERED, EXPOSED, INTERNAL, KEY, OTHER, PROTOS, both, families, path, put
from wired import FIREWALL, LAN, NET, PROBLEM, WORK, Addresses, Wired

from qubes_fwd_qrexec.firewall.nfttool import Nft

pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))


@families
def test_limits_hold(wired: Wired, at: Addresses) -> None:
    server = wired.serve("tcp", WORK, INTERNAL)
    put(wired, path(limits="connections:3,per-source:2"))
    for _ in range(2):
        wired.connect(LAN, at.net, EXPOSED, at.lan)
        server.accept()
    assert wired.send("tcp", LAN, at.net, EXPOSED, at.lan) == "dropped in sys-net"


@families
def test_each_of_both_protocols_has_the_whole_limit(wired: Wired, at: Addresses) -> None:
    servers = {proto: wired.serve(proto, WORK, INTERNAL) for proto in PROTOS}
    put(wired, path("both", limits="connections:1,per-source:1"))
    assert wired.send("udp", LAN, at.net, EXPOSED, at.lan) == ANSWERED
    wired.connect(LAN, at.net, EXPOSED, at.lan)
    servers["tcp"].accept()
    for proto in PROTOS:
        assert wired.send(proto, LAN, at.net, EXPOSED, at.lan) == "dropped in sys-net"


@families
def test_new_connections_are_limited_by_the_second(wired: Wired, at: Addresses) -> None:
    wired.serve("udp", WORK, INTERNAL)
    put(wired, path("udp", limits="rate:1"))
    assert wired.send("udp", LAN, at.net, EXPOSED, at.lan) == ANSWERED
    until_s = time.monotonic() + BOUND_S
    while (found := wired.send("udp", LAN, at.net, EXPOSED, at.lan)) == ANSWERED:
        assert time.monotonic() < until_s  # a busy machine may send less than one a second for a while
    assert found == "dropped in sys-net"


@families
def test_connections_and_bytes_are_counted_through_changes(wired: Wired, at: Addresses) -> None:
    wired.serve("udp", WORK, INTERNAL)
    made = path("udp")
    put(wired, made)
    for _ in range(3):
        assert wired.send("udp", LAN, at.net, EXPOSED, at.lan) == ANSWERED
    put(wired, both(made, path("tcp", "nft.work.more", first=OTHER)))
    for qube in (NET, FIREWALL, WORK):
        with wired.places.entering(qube)():
            counted = Nft().counters()
        assert counted[f"{KEY}/new"][0] == 3
        assert counted[f"{KEY}/in"][0] == 3
        if qube != WORK:
            assert counted[f"{KEY}/out"] == counted[f"{KEY}/in"]
