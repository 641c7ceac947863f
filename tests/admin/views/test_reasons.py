# SPDX-License-Identifier: GPL-2.0-or-later
"""Each state and each cause of a rule, with the sentence that says what to do about it."""

import pytest
from test_nftreasons import BY_NFT
from worlds import NOW, OURS, nft_world, only, qube, rule, world

from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import Cause, State
from qubes_fwd_qrexec.admin.views import parser, reasons
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.common.values import QubeName


def halted(name: str, netvm: str | None = None) -> Inventory:
    return world(qube(name, netvm, is_running=False, template=QubeName("fedora-42")))


_WIDE = ",".join(f"2001:db8:{n:x}::/48" for n in range(256))

CASES = [
    (
        "open",
        rule("dstports=8080 srchosts=192.168.0.0/16"),
        world(),
        State.ACTIVE,
        "Connections to port 80 of sys-net (outer side) from 192.168.0.0/16 reach port 8080 of work.",
    ),
    (
        "open",
        rule("srcports=80-81 listen=10.0.0.1 srchosts=any"),
        world(),
        State.ACTIVE,
        "Connections to ports 80-81 of sys-net at 10.0.0.1 (outer side) from anybody who can reach it reach "
        "ports 80-81 of work.",
    ),
    (
        "exposed-halted",
        rule(),
        halted("sys-net"),
        State.WAITING,
        "sys-net is halted and will listen when it starts: 'qvm-start sys-net'.",
    ),
    (
        "target-halted",
        rule(),
        halted("work", "sys-firewall"),
        State.WAITING,
        "work is halted, and nobody is answered until it runs: 'qvm-start work', or let connections start it "
        "with autostart=yes.",
    ),
    (
        "open",
        rule("autostart=yes"),
        halted("work", "sys-firewall"),
        State.ACTIVE,
        "Connections to port 80 of sys-net (outer side) from anybody who can reach it reach port 80 of work.",
    ),
    (
        "cloned",
        rule("owner=office"),
        world(),
        State.SUSPENDED,
        "The rule was made for office and came to work by cloning or renaming; 'qvm-forward confirm work "
        "web' makes it a rule of work, 'qvm-forward remove work web' removes it.",
    ),
    (
        "netvm-changed",
        rule("path=sys-vpn,sys-net"),
        world(),
        State.SUSPENDED,
        "The netvms of work were sys-vpn - sys-net when the rule was agreed to and are sys-firewall - "
        "sys-net now; 'qvm-forward confirm work web' agrees to the new path, and with follow-netvm=yes the "
        "rule follows every change.",
    ),
    (
        "expired",
        rule(f"expire={NOW}"),
        world(),
        State.EXPIRED,
        "It has expired; 'qvm-forward set work web expire=+8h' extends it, 'qvm-forward remove work "
        "web' removes it.",
    ),
    (
        "disabled",
        rule("enabled=no"),
        world(),
        State.DISABLED,
        "'qvm-forward enable work web' opens it again.",
    ),
    (
        "no-such-qube",
        rule(target="gone"),
        world(),
        State.REFUSED,
        "There is no qube gone; name one that 'qvm-ls' shows.",
    ),
    (
        "no-such-qube",
        rule("via=gone"),
        world(),
        State.REFUSED,
        "There is no qube gone to listen; name another one with via=QUBE.",
    ),
    (
        "unfit-qube",
        rule(target="dom0"),
        world(),
        State.REFUSED,
        "dom0 is the administrative qube and must not be the target of a forward; name the qube that runs "
        "the service.",
    ),
    (
        "unfit-qube",
        rule(target="fedora-42"),
        world(),
        State.REFUSED,
        "fedora-42 is a template and must not be the target of a forward; name the qube that runs the "
        "service.",
    ),
    (
        "unfit-qube",
        rule("via=dom0"),
        world(),
        State.REFUSED,
        "dom0 is the administrative qube and must not listen; name another qube with via=QUBE.",
    ),
    (
        "unfit-qube",
        rule("via=work"),
        world(),
        State.REFUSED,
        "work cannot listen for itself, as qrexec connects two different qubes; name another qube with "
        "via=QUBE.",
    ),
    (
        "no-netvm",
        rule(target="vault"),
        world(),
        State.REFUSED,
        "vault has no netvm that could listen for it; name the qube that should listen with via=QUBE (--via "
        "QUBE).",
    ),
    (
        "netvm-broken",
        rule(),
        world(qube("sys-net", "sys-firewall")),
        State.REFUSED,
        "The netvms of work form a loop at sys-firewall; change its netvm.",
    ),
    (
        "netvm-broken",
        rule(),
        world(without=("sys-net",)),
        State.REFUSED,
        "The netvm of sys-firewall, sys-net, does not exist; set another.",
    ),
    (
        "open",
        rule("proto=udp srcports=53"),
        world(),
        State.ACTIVE,
        "UDP packets to port 53 of sys-net (outer side) from anybody who can reach it reach port 53 of work.",
    ),
    (
        "open",
        rule("proto=both srcports=53"),
        world(),
        State.ACTIVE,
        "Connections and UDP packets to port 53 of sys-net (outer side) from anybody who can reach it reach "
        "port 53 of work.",
    ),
    (
        "target-halted",
        rule("proto=both"),
        halted("work", "sys-firewall"),
        State.WAITING,
        "work is halted, and nobody is answered until it runs: 'qvm-start work', or let connections and UDP "
        "packets start it with autostart=yes.",
    ),
    (
        "no-service",
        rule("proto=udp", target="personal"),
        world(),
        State.REFUSED,
        "personal does not offer qubes.ForwardUDP, without which no UDP gets there over qrexec; install "
        "qubes-fwd-qrexec in its template debian-12 and restart personal, or send it by nft with mode=nft.",
    ),
    (
        "no-service",
        rule("transport=mux", target="personal"),
        world(),
        State.REFUSED,
        "The rule asks for transport=mux, but personal does not offer qubes.ForwardTCP; install "
        "qubes-fwd-qrexec in its template debian-12 and restart personal, or leave transport=mux out.",
    ),
    (
        "no-service",
        rule("proxy=v1", target="personal"),
        world(),
        State.REFUSED,
        "The rule asks for proxy, but personal does not offer qubes.ForwardTCP; install qubes-fwd-qrexec in "
        "its template debian-12 and restart personal, or leave proxy out.",
    ),
    (
        "no-service",
        rule("transport=mux", target="own"),
        world(qube("own", "sys-firewall", klass="StandaloneVM")),
        State.REFUSED,
        "The rule asks for transport=mux, but own does not offer qubes.ForwardTCP; install "
        "qubes-fwd-qrexec in own, or leave transport=mux out.",
    ),
    (
        "no-service",
        rule(target="win"),
        world(qube("win", "sys-firewall", klass="StandaloneVM", features={"os": "Windows"})),
        State.REFUSED,
        "win runs Windows, which has neither qubes.ForwardTCP nor qubes.ConnectTCP; name a target that runs "
        "Linux.",
    ),
    (
        "unfit-qube",
        rule(target="far"),
        world(qube("far", klass="RemoteVM")),
        State.REFUSED,
        "far is a qube of another machine and cannot be the target of a forward; name the qube that runs the "
        "service.",
    ),
    (
        "unfit-qube",
        rule("via=far"),
        world(qube("far", klass="RemoteVM")),
        State.REFUSED,
        "far is a qube of another machine and cannot listen; name another qube with via=QUBE.",
    ),
    (
        "unfit-qube",
        rule("via=bare"),
        world(qube("bare", klass="StandaloneVM", features={"qrexec": ""})),
        State.REFUSED,
        "bare has no qrexec (feature qrexec) and cannot listen; name another qube with via=QUBE.",
    ),
    (
        "tunnel-in-the-path",
        rule(target="hidden"),
        world(),
        State.REFUSED,
        "hidden is behind a tunnel, marked at sys-vpn (feature service.vpn-handler-openvpn), and listening "
        "at sys-net would bypass it; expose it at sys-vpn with via=sys-vpn (--via sys-vpn), or accept "
        "that with bypass-tunnel=yes (--bypass-tunnel).",
    ),
    (
        "tunnel-in-the-path",
        rule(),
        world(qube("work", "sys-firewall", tags=frozenset({"anon-vm"}), features=OURS)),
        State.REFUSED,
        "work is behind a tunnel, marked at work (tag anon-vm), and listening at sys-net would bypass it; "
        "do not expose it, or accept that with bypass-tunnel=yes (--bypass-tunnel).",
    ),
    (
        "tunnel-in-the-path",
        rule(),
        world(qube("work", "sys-firewall", features=OURS | {"forward.tunnel": "1"})),
        State.REFUSED,
        "work is a tunnel itself (feature forward.tunnel), and listening at sys-net would bypass it; "
        "do not expose it, or accept that with bypass-tunnel=yes (--bypass-tunnel).",
    ),
    (
        "tunnel-in-the-path",
        rule(target="sys-vpn"),
        world(),
        State.REFUSED,
        "sys-vpn is a tunnel itself (feature service.vpn-handler-openvpn), and listening at sys-net would "
        "bypass it; expose it at a qube behind it with via=QUBE (--via QUBE), or accept that with "
        "bypass-tunnel=yes (--bypass-tunnel).",
    ),
    (
        "too-large",
        rule("srcports=1-257 transport=call"),
        world(),
        State.REFUSED,
        "With one call for each connection every port needs its own policy line, and 257 ports are more "
        "than 256; make the range shorter, or use transport=mux.",
    ),
    (
        "too-large",
        rule("srcports=1-257", target="personal"),
        world(),
        State.REFUSED,
        "With one call for each connection every port needs its own policy line, and 257 ports are more "
        "than 256; make the range shorter, or install qubes-fwd-qrexec in its template debian-12 and "
        "restart personal.",
    ),
    (
        "too-large",
        rule(f"srchosts={_WIDE}"),
        world(),
        State.REFUSED,
        "fwd.work.web: the configuration has 4442 bytes and QubesDB takes 3071; name fewer or larger "
        "networks in srchosts.",
    ),
]
CASES += [
    (
        "open",
        rule("srchosts=10.138.0.0/16,personal,@tag:games forwardtype=internal"),
        nft_world(),
        State.ACTIVE,
        "Connections to port 80 of sys-firewall (vifs side) from 10.138.0.0/16, personal, @tag:games reach "
        "port 80 of work.",
    ),
    (
        "source-elsewhere",
        rule("srchosts=hidden forwardtype=internal"),
        nft_world(),
        State.REFUSED,
        "hidden cannot reach sys-firewall, as its netvm is sys-vpn: expose the forward there with "
        "via=sys-vpn (--via sys-vpn), or change the netvm of hidden with "
        "'qvm-prefs hidden netvm sys-firewall'.",
    ),
    (
        "no-source",
        rule("srchosts=gone,@tag:games forwardtype=internal"),
        nft_world(),
        State.REFUSED,
        "Nobody may connect, as none of the qubes that the rule names is left; name another one that has "
        "sys-firewall as its netvm.",
    ),
]
CASES.append(
    (
        "unreadable-qube",
        rule(),
        world(qube("sys-net", provides_network=True, problem="sys-net: no answer")),
        State.REFUSED,
        "Nothing opens while something about its qubes is unknown: sys-net: no answer.",
    )
)


@pytest.mark.parametrize(("cause", "named", "inventory", "state", "sentence"), CASES)
def test_every_state_has_its_sentence(
    cause: str, named: NamedRule, inventory: Inventory, state: State, sentence: str
) -> None:
    forward = only(named, inventory)
    assert (forward.state, forward.cause, reasons.sentence(forward)) == (state, cause, sentence)
    assert forward.is_live == (state in (State.ACTIVE, State.WAITING)) == bool(forward.configs)


def test_every_cause_of_a_rule_is_in_the_table_or_not_of_one_rule() -> None:
    others = {Cause.CONFLICT, Cause.UNREADABLE, Cause.HELD, *(Cause(case[0]) for case in BY_NFT)}
    deciding = [*Cause][: [*Cause].index(Cause.IN_TIME)]
    assert {Cause(case[0]) for case in CASES} | others == set(deciding)


CLOSED = [case[:3] for case in CASES if case[0] != "open"]


@pytest.mark.parametrize(("cause", "named", "inventory"), CLOSED, ids=range(len(CLOSED)))
def test_every_state_has_a_way_out_that_is_a_command(
    cause: str, named: NamedRule, inventory: Inventory
) -> None:
    ways = reasons.ways_out(only(named, inventory))
    assert ways
    for program, *arguments in ways:
        assert program in ("qvm-forward", "qvm-start", "qvm-prefs")
        if program == "qvm-forward":
            parser.parse(arguments)


def test_a_hold_is_ended_by_resume_and_stops_nothing_twice() -> None:
    planned = plan([rule(), rule("enabled=no", name="off")], world(), NOW).held()
    off, web = planned
    assert (off.state, web.state, planned.live) == (State.DISABLED, State.HELD, ())
    assert reasons.ways_out(web) == (("qvm-forward", "resume"),)
    assert reasons.sentence(web) == f"{reasons.HELD}."


def test_of_two_rules_for_one_port_the_second_may_take_another_or_end_the_first() -> None:
    _, second = plan([rule(name="a"), rule(name="b")], world(), NOW)
    assert reasons.ways_out(second) == (
        ("qvm-forward", "set", "work", "b", "srcports=PORTS"),
        ("qvm-forward", "disable", "work", "a"),
    )
