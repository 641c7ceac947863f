# SPDX-License-Identifier: GPL-2.0-or-later
"""Each state and each cause of a rule, with the sentence that says what to do about it."""

import pytest
from worlds import NOW, OURS, qube, rule, world

from qubes_fwd_qrexec.admin.abilities import Abilities
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import Cause, Forward, State
from qubes_fwd_qrexec.config import Service
from qubes_fwd_qrexec.rules import BrokenRule, Mode, NamedRule, Transport
from qubes_fwd_qrexec.values import QubeName, RuleName

ALL = Abilities(nft=True, tunnel=True, proxy=True, limits=True)


def only(named: NamedRule, inventory: Inventory | None = None, **more: Abilities) -> Forward:
    (forward,) = plan([named], inventory or world(), NOW, **more)
    return forward


def halted(name: str, netvm: str | None = None) -> Inventory:
    return world(qube(name, netvm, is_running=False, template=QubeName("fedora-42")))


_WIDE = ",".join(f"2001:db8:{n:x}::/48" for n in range(256))

CASES = [
    (
        "open",
        rule("dstports=8080 srchosts=192.168.0.0/16"),
        world(),
        State.ACTIVE,
        "Connections to port 80 of sys-net from 192.168.0.0/16 reach port 8080 of work.",
    ),
    (
        "open",
        rule("srcports=80-81 listen=10.0.0.1 srchosts=any"),
        world(),
        State.ACTIVE,
        "Connections to ports 80-81 of sys-net at 10.0.0.1 from anybody who can reach it reach ports 80-81 "
        "of work.",
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
        "work is halted, and connections are refused until it runs: 'qvm-start work', or let connections "
        "start it with autostart=yes.",
    ),
    (
        "open",
        rule("autostart=yes"),
        halted("work", "sys-firewall"),
        State.ACTIVE,
        "Connections to port 80 of sys-net from anybody who can reach it reach port 80 of work.",
    ),
    (
        "cloned",
        rule("owner=office"),
        world(),
        State.SUSPENDED,
        "The rule was made for office and came to work by cloning or renaming; 'qvm-forward confirm work "
        "web' makes it one of work, 'qvm-forward remove work web' drops it.",
    ),
    (
        "netvm-changed",
        rule("path=sys-vpn,sys-net"),
        world(),
        State.SUSPENDED,
        "The netvms of work were sys-vpn - sys-net when the rule was agreed to and are sys-firewall - "
        "sys-net now; 'qvm-forward confirm work web' agrees to the new way, and with follow-netvm=yes the "
        "rule follows every change.",
    ),
    (
        "expired",
        rule(f"expire={NOW}"),
        world(),
        State.EXPIRED,
        "Its time is over; 'qvm-forward set work web expire=+8h' gives it more, 'qvm-forward remove work "
        "web' ends it.",
    ),
    (
        "disabled",
        rule("enabled=no"),
        world(),
        State.DISABLED,
        "It was disabled; 'qvm-forward enable work web' opens it again.",
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
        "vault has no netvm that could listen for it; name the qube that shall listen with --via QUBE "
        "(option via=QUBE).",
    ),
    (
        "netvm-broken",
        rule(),
        world(qube("sys-net", "sys-firewall")),
        State.REFUSED,
        "the netvms of work lead in a circle at sys-firewall; mend its netvm.",
    ),
    (
        "netvm-broken",
        rule(),
        world(without=("sys-net",)),
        State.REFUSED,
        "sys-net, the netvm of sys-firewall, does not exist; set another.",
    ),
    (
        "not-in-this-version",
        rule("mode=nft"),
        world(),
        State.REFUSED,
        "The rule asks for mode=nft and this version of qvm-forward cannot do that yet; mode=qrexec would "
        "work for TCP.",
    ),
    (
        "not-in-this-version",
        rule("proto=udp"),
        world(),
        State.REFUSED,
        "The rule asks for proto=udp, which needs mode=nft, and this version of qvm-forward cannot do that "
        "yet; only TCP works.",
    ),
    (
        "no-service",
        rule("transport=tunnel", target="personal"),
        world(),
        State.REFUSED,
        "The rule asks for transport=tunnel and personal does not offer qubes.ForwardTCP; install "
        "qubes-fwd-qrexec in its template and start personal again, or leave transport=tunnel out.",
    ),
    (
        "no-service",
        rule("proxy=v1", target="personal"),
        world(),
        State.REFUSED,
        "The rule asks for proxy and personal does not offer qubes.ForwardTCP; install qubes-fwd-qrexec in "
        "its template and start personal again, or leave proxy out.",
    ),
    (
        "not-in-this-version",
        rule("limits=rate:5"),
        world(),
        State.REFUSED,
        "The rule asks for limits and this version of qvm-forward cannot do that yet; leave limits out.",
    ),
    (
        "tunnel-in-the-path",
        rule(target="hidden"),
        world(),
        State.REFUSED,
        "hidden is behind a tunnel, marked at sys-vpn (feature service.vpn-handler-openvpn), and listening "
        "at sys-net would go round it; expose it at sys-vpn with via=sys-vpn, or accept that with "
        "bypass-tunnel=yes (--bypass-tunnel).",
    ),
    (
        "tunnel-in-the-path",
        rule(),
        world(qube("work", "sys-firewall", tags=frozenset({"anon-vm"}), features=OURS)),
        State.REFUSED,
        "work is behind a tunnel, marked at work (tag anon-vm), and listening at sys-net would go round "
        "it; expose it nowhere, or accept that with bypass-tunnel=yes (--bypass-tunnel).",
    ),
    (
        "too-large",
        rule("srcports=1-257 transport=call"),
        world(),
        State.REFUSED,
        "With one call for each connection every port needs its own policy line, and 257 ports are more "
        "than 256; make the range shorter, or use transport=tunnel.",
    ),
    (
        "too-large",
        rule("srcports=1-257", target="personal"),
        world(),
        State.REFUSED,
        "With one call for each connection every port needs its own policy line, and 257 ports are more "
        "than 256; make the range shorter, or install qubes-fwd-qrexec in its template and start personal "
        "again.",
    ),
    (
        "too-large",
        rule(f"srchosts={_WIDE}"),
        world(),
        State.REFUSED,
        "fwd.work.web: the configuration has 4434 bytes and QubesDB takes 3071; name fewer or larger "
        "networks in srchosts.",
    ),
]


@pytest.mark.parametrize(("cause", "named", "inventory", "state", "sentence"), CASES)
def test_every_state_has_its_sentence(
    cause: str, named: NamedRule, inventory: Inventory, state: State, sentence: str
) -> None:
    forward = only(named, inventory)
    assert (forward.state, forward.cause, forward.reason) == (state, cause, sentence)
    assert forward.is_live == (state in (State.ACTIVE, State.WAITING)) == (forward.config is not None)


def test_every_cause_of_a_rule_is_in_the_table_or_tested_below() -> None:
    below = {Cause.CONFLICT, Cause.UNREADABLE}
    assert {Cause(case[0]) for case in CASES} | below == set(Cause)


def test_external_is_the_outermost_and_internal_the_nearest_netvm() -> None:
    assert only(rule()).exposed == "sys-net"
    assert only(rule("forwardtype=internal")).exposed == "sys-firewall"
    assert only(rule("forwardtype=internal via=personal")).exposed == "personal"


def test_a_target_without_netvm_is_exposed_where_the_rule_says() -> None:
    forward = only(rule("via=sys-net path=", target="vault"))
    assert (forward.state, forward.exposed) == (State.ACTIVE, "sys-net")


def test_a_rule_that_follows_its_netvm_goes_on_after_a_change() -> None:
    assert only(rule("path=sys-vpn follow-netvm=yes")).state is State.ACTIVE


def test_a_rule_with_its_recorded_path_is_active_without_notes() -> None:
    forward = only(rule("path=sys-firewall,sys-net"))
    assert (forward.state, forward.notes) == (State.ACTIVE, ())


def test_missing_owner_and_path_are_noted() -> None:
    notes = only(rule("owner=")).notes
    assert [note.split(",")[0] for note in notes] == ["no owner recorded", "no path recorded"]


def test_auto_becomes_a_tunnel_where_the_target_has_our_service() -> None:
    forward = only(rule())
    assert (forward.mode, forward.transport, forward.service) == (
        Mode.QREXEC,
        Transport.TUNNEL,
        Service.FORWARD_TCP,
    )
    assert forward.mode_reason == "mode=auto, and this version has no nft mode"
    assert forward.transport_reason == "work offers our service"
    assert only(rule("srcports=1-65535")).state is State.ACTIVE


@pytest.mark.parametrize("asked", ["tunnel", "call"])
def test_our_service_is_used_as_the_rule_says(asked: str) -> None:
    forward = only(rule(f"transport={asked}"))
    assert (forward.transport, forward.service) == (Transport(asked), Service.FORWARD_TCP)
    assert forward.transport_reason == "the rule says so"


@pytest.mark.parametrize("asked", ["", "transport=tunnel"])
def test_the_tunnel_carries_who_the_client_is(asked: str) -> None:
    forward = only(rule(f"proxy=v2 {asked}"))
    assert forward.transport is Transport.TUNNEL
    assert forward.config is not None
    assert forward.config.proxy == "v2"


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        ("transport=tunnel", Cause.NOT_YET),
        ("proxy=v2", Cause.NOT_YET),
        ("srcports=1-257", Cause.TOO_LARGE),
        ("", Cause.OPEN),
    ],
)
def test_a_version_without_the_tunnel_makes_calls_and_refuses_what_needs_it(asked: str, cause: Cause) -> None:
    forward = only(rule(asked), abilities=Abilities(tunnel=False, proxy=False))
    assert forward.cause is cause
    assert forward.transport in (Transport.AUTO, Transport.CALL)


def test_a_target_without_our_service_is_reached_by_the_stock_one_and_the_reason_warns() -> None:
    forward = only(rule(target="personal"))
    assert (forward.transport, forward.service) == (Transport.CALL, Service.CONNECT_TCP)
    assert "loses the rest of what the client sends" in forward.transport_reason


def test_limits_are_taken_once_this_version_is_able() -> None:
    assert only(rule("limits=rate:5"), abilities=ALL).state is State.ACTIVE


def test_a_bypassed_tunnel_is_labelled() -> None:
    forward = only(rule("bypass-tunnel=yes", target="hidden"))
    assert forward.state is State.ACTIVE
    assert "bypasses the tunnel sys-vpn (feature service.vpn-handler-openvpn)" in forward.notes


@pytest.mark.parametrize("via", ["sys-vpn", "below"])
def test_at_the_tunnel_or_behind_it_is_fine(via: str) -> None:
    forward = only(rule(f"via={via}", target="hidden"), world(qube("below", "sys-vpn")))
    assert (forward.state, forward.exposed) == (State.ACTIVE, via)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("srcports=80", "srcports=80"),
        ("srcports=80-90", "srcports=85-95"),
        ("srcports=80 listen=10.0.0.1", "srcports=80 srchosts=10.0.0.0/8"),
        ("srcports=80 srchosts=fd00::/8", "srcports=80"),
        ("srcports=80 listen=10.0.0.1", "srcports=80 listen=10.0.0.1"),
    ],
)
def test_of_two_claims_to_one_port_the_first_by_name_wins_and_is_named(one: str, other: str) -> None:
    first, second = plan([rule(other, "work"), rule(one, "personal")], world(), NOW)
    assert (first.source.target, first.state) == ("personal", State.ACTIVE)
    assert (second.state, second.cause, second.config) == (State.REFUSED, Cause.CONFLICT, None)
    assert second.reason.startswith("Rule personal web has port ")


def test_a_newcomer_never_takes_the_port_of_what_is_there() -> None:
    newcomer, there = rule(target="personal"), rule(target="work")
    key = (newcomer.target, newcomer.name)
    first, second = plan([newcomer, there], world(), NOW, newcomer=key)
    assert (first.cause, second.state) == (Cause.CONFLICT, State.ACTIVE)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("srcports=80", "srcports=81"),
        ("srcports=80 listen=10.0.0.1", "srcports=80 listen=10.0.0.2"),
        ("srcports=80 srchosts=10.0.0.0/8", "srcports=80 srchosts=fd00::/8"),
        ("srcports=80", "srcports=80 forwardtype=internal"),
        ("srcports=80", "srcports=80 enabled=no"),
        ("srcports=80 owner=other", "srcports=80"),
    ],
)
def test_other_ports_addresses_families_qubes_and_idle_rules_do_not_conflict(one: str, other: str) -> None:
    found = plan([rule(one, name="a"), rule(other, name="b")], world(), NOW)
    assert Cause.CONFLICT not in {forward.cause for forward in found}


def test_two_ways_to_one_port_must_agree_about_autostart() -> None:
    rules = [
        rule("srcports=80 dstports=22", name="a"),
        rule("srcports=81 dstports=22 autostart=yes", name="b"),
    ]
    _, second = plan(rules, world(), NOW)
    assert second.cause is Cause.CONFLICT
    assert "give both the same autostart" in second.reason


def test_the_plan_keeps_broken_rules_and_finds_by_name() -> None:
    broken = BrokenRule(QubeName("work"), "x", "y", "z")
    found = plan([rule()], world(), NOW, broken=[broken])
    assert found.broken == (broken,)
    assert found.find("work", "web") == found.forwards[0]
    assert found.find("work", RuleName("nope")) is None
    assert found.live == found.forwards


def test_a_forward_concerns_target_exposed_and_all_between() -> None:
    forward = only(rule("via=personal", target="work"))
    assert all(forward.concerns(name) for name in ("work", "personal", "sys-firewall", "sys-net"))
    assert not forward.concerns("vault")
