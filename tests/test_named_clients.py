# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients by name, from dom0's decision to packets: the qube that is named gets through, and no other one.

That is what antispoofing is for, so those who are out for mischief have no firewall of their own.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from wired import (
    BESIDE_FIREWALL,
    BESIDE_WORK,
    FAMILIES,
    FIREWALL,
    PROBLEM,
    VPN,
    WORK,
    Addresses,
    Wired,
    open_wired,
)

from qubes_fwd_qrexec.admin import checks, nftpath
from qubes_fwd_qrexec.common.config import ListenerConfig, Service, Side
from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.rules import ForwardRule, NamedRule, Transport
from qubes_fwd_qrexec.common.values import Proto, QubeName, RuleName, Sources
from qubes_fwd_qrexec.firewall.cutting import Cutter
from qubes_fwd_qrexec.firewall.inforce import InForce
from qubes_fwd_qrexec.firewall.nfttool import Nft
from qubes_fwd_qrexec.firewall.pathrules import Kept
from qubes_fwd_qrexec.firewall.wanted import Firewall, Wanted
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.stockrules import Shape
from qubes_fwd_qrexec.lab.store import LabStore

pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))

BY_NFT, BY_QREXEC, SERVER = 80, 81, 8080
PATH = (QubeName(WORK), QubeName(FIREWALL))


def rule(ports: str, proto: str) -> NamedRule:
    text = f"action=forward forwardtype=internal proto={proto} {ports} srchosts={BESIDE_WORK}"
    return NamedRule(PATH[0], RuleName(proto), ForwardRule.parse(text))


@pytest.fixture(scope="module", params=Shape)
def wired(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wired]:
    """Ports of sys-firewall lead to work by nft, or to a listener there, for a neighbour of work alone."""
    place: Path = tmp_path_factory.mktemp("w") / "lab"
    with open_wired(place, request.param, has_vpn=True) as made:
        inventory = LabStore(LabDirectory(place)).inventory()

        def sources(named: NamedRule) -> Sources:
            found, *_ = checks.resolved(named, PATH[1], inventory)
            assert found is not None
            return found

        told: dict[str, list[NftConfig]] = {qube: [] for qube in PATH}
        for proto in ("tcp", "udp"):
            named = rule(f"srcports={BY_NFT} dstports={SERVER}", proto)
            for qube, config in nftpath.configs(named, sources(named), PATH, Side.VIFS, inventory):
                told[qube].append(config)
            made.serve(proto, WORK, SERVER)
        made.serve("tcp", FIREWALL, BY_QREXEC)
        listens = rule(f"srcports={BY_QREXEC}", "tcp")
        listener = ListenerConfig.of_rule(
            *listens, sources(listens), Service.FORWARD_TCP, Transport.MUX, Side.VIFS
        )
        bound = frozenset((Proto.TCP, address, BY_QREXEC) for address in listener.listen)
        for qube, wanted in (
            (FIREWALL, Wanted((listener,), bound, paths=tuple(map(Kept, told[FIREWALL])))),
            (WORK, Wanted(paths=tuple(map(Kept, told[WORK])))),
        ):
            with made.places.entering(qube)():
                InForce(Firewall(Nft()), Cutter()).put(wanted)
        for qube in (BESIDE_WORK, BESIDE_FIREWALL, VPN):
            made.nft(qube, "flush ruleset")
        yield made


ways = pytest.mark.parametrize(
    ("proto", "port", "server"),
    [("tcp", BY_NFT, WORK), ("udp", BY_NFT, WORK), ("tcp", BY_QREXEC, FIREWALL)],
    ids=["nft-tcp", "nft-udp", "qrexec"],
)
families = pytest.mark.parametrize("at", FAMILIES, ids=lambda at: at.nft)


@ways
@families
def test_the_named_qube_gets_through(wired: Wired, proto: str, port: int, server: str, at: Addresses) -> None:
    assert wired.send(proto, BESIDE_WORK, at.firewall, port) == f"answered by {server}"


@ways
@families
def test_no_neighbour_gets_through(wired: Wired, proto: str, port: int, server: str, at: Addresses) -> None:
    for qube in (VPN, BESIDE_FIREWALL):
        # IPv4 from a neighbour to a netvm is rejected by the stock rules.
        assert wired.send(proto, qube, at.firewall, port).split()[0] in ("dropped", "refused")


@ways
@families
def test_the_named_qubes_address_helps_nobody_else(
    wired: Wired, proto: str, port: int, server: str, at: Addresses
) -> None:
    assert wired.send(proto, VPN, at.firewall, port, at.beside_work) == "dropped in sys-firewall"
    assert wired.send(proto, BESIDE_FIREWALL, at.firewall, port, at.beside_work) == "dropped in sys-net"
    assert wired.send(proto, BESIDE_WORK, at.firewall, port, at.vpn) == "dropped in sys-firewall"


@ways
@families
def test_nobody_takes_the_named_qubes_place_while_it_is_halted(
    wired: Wired, proto: str, port: int, server: str, at: Addresses
) -> None:
    wired.halt(BESIDE_WORK)
    try:
        assert wired.send(proto, VPN, at.firewall, port, at.beside_work) == "dropped in sys-firewall"
    finally:
        wired.start(BESIDE_WORK)
