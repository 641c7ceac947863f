# SPDX-License-Identifier: GPL-2.0-or-later
"""Each cause of a rule whose forward goes by nft, with the sentence that says what to do about it."""

from dataclasses import replace

import pytest
from worlds import nft_world, only, qube, rule

from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.states import Cause
from qubes_fwd_qrexec.admin.views import parser, reasons
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.common.values import Proto, QubeName

_OR_QREXEC = ", or send it over qrexec with mode=qrexec."
_AS_QREXEC = ("qvm-forward", "set", "work", "web", "mode=qrexec")
_BARE = qube("sys-firewall", "sys-net", ip="10.137.0.6", template=QubeName("debian-12"))
_DEBIAN = qube("debian-12", klass="TemplateVM")

BY_NFT = [
    (
        "no-netvm",
        rule("mode=nft"),
        nft_world(qube("work")),
        "work has no netvm, so no packets reach it; give it one with 'qvm-prefs work netvm NETVM'",
    ),
    (
        "no-ip-path",
        rule("mode=nft via=personal"),
        nft_world(),
        "personal is not a netvm of work, and mode=nft follows its netvms; leave out via",
    ),
    (
        "nft-behind-tunnel",
        rule("mode=nft bypass-tunnel=yes", "hidden"),
        nft_world(),
        "hidden is behind a tunnel, marked at sys-vpn (feature service.vpn-handler-x), and mode=nft sends no "
        "packets past a tunnel",
    ),
    (
        "no-nft-service",
        rule("mode=nft"),
        nft_world(_BARE, _DEBIAN),
        "sys-firewall does not offer qubes.ForwardNft, which mode=nft needs at every qube of the path; "
        "install qubes-fwd-qrexec in its template debian-12 and restart sys-firewall",
    ),
    (
        "nft-switched-off",
        rule("mode=nft"),
        nft_world(_BARE, _DEBIAN),
        "sys-firewall has the service qubes-forward-nft switched off, which mode=nft needs at every qube of "
        "the path; 'qvm-service sys-firewall qubes-forward-nft on' switches it on when sys-firewall starts "
        "again",
    ),
    (
        "no-address",
        rule("mode=nft srchosts=fd00::/8"),
        nft_world(_BARE, _DEBIAN),
        "sys-firewall has no IPv6 address, so IPv6 does not reach work; leave out IPv6 networks",
    ),
    (
        "too-large",
        rule("mode=nft srcports=1-1025 dstports=2-1026"),
        nft_world(),
        "mode=nft can move a range of up to 1,024 ports to other ports, and this one has 1,025; expose the "
        "same ports that the target uses",
    ),
    (
        "nft-at-whonix",
        rule("mode=nft"),
        nft_world(nft_world().qubes[QubeName("work")]._replace(tags=frozenset({"anon-vm"}))),
        "Whonix runs in work (tag anon-vm), and its own firewall, which replaces that of Qubes, refuses what "
        "is forwarded; send nothing to it by nft",
    ),
    (
        "link-local",
        rule("mode=nft srchosts=fe80::/10"),
        nft_world(),
        "Addresses in fe80::/10 are link-local, and packets from them cannot be forwarded; let in other "
        "networks",
    ),
    (
        "nft-at-loopback",
        rule("mode=nft listen=127.0.0.1"),
        nft_world(),
        "Packets to a loopback address are not forwarded; take another listen address",
    ),
    (
        "exposed-halted",
        rule("mode=nft"),
        nft_world(qube("sys-net", is_running=False)),
        "sys-net is halted and will forward when it starts: 'qvm-start sys-net'.",
    ),
    (
        "hop-halted",
        rule("mode=nft"),
        nft_world(qube("sys-firewall", "sys-net", is_running=False)),
        "sys-firewall, which is on the path, is halted: 'qvm-start sys-firewall'.",
    ),
    (
        "target-halted",
        rule("mode=nft"),
        nft_world(qube("work", "sys-firewall", is_running=False)),
        "work is halted, and nobody answers until it runs: 'qvm-start work'.",
    ),
]


@pytest.mark.parametrize(
    ("cause", "named", "inventory", "sentence"), BY_NFT, ids=[case[0] for case in BY_NFT]
)
def test_what_is_found_on_a_path_by_nft_has_its_sentence_and_a_way_out(
    cause: str, named: NamedRule, inventory: Inventory, sentence: str
) -> None:
    forward = only(named, inventory)
    finding = forward.finding(Cause(cause))
    assert finding is not None
    may_change = not sentence.endswith(".")
    assert reasons.sentence(forward, finding) == sentence + (_OR_QREXEC if may_change else "")
    ways = reasons.ways_out(forward, finding)
    assert (_AS_QREXEC[:2] + tuple(named[:2]) + _AS_QREXEC[4:] in ways) is may_change
    datagrams = only(named._replace(rule=replace(named.rule, proto=Proto.BOTH)), inventory)
    assert (reasons.sentence(datagrams, finding), reasons.ways_out(datagrams, finding)) == (
        reasons.sentence(forward, finding),
        ways,
    )
    for program, *arguments in ways:
        assert program in ("qvm-forward", "qvm-start", "qvm-prefs", "qvm-service")
        if program == "qvm-forward":
            parser.parse(arguments)
            assert "mode=qrexec" not in arguments or may_change
