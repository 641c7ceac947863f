# SPDX-License-Identifier: GPL-2.0-or-later
"""Which of two rules has a port, and what shares one without being in conflict."""

import pytest
from worlds import NOW, nft_world, rule, world

from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import Cause, State
from qubes_fwd_qrexec.admin.views import reasons


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
    assert (first.named.target, first.state) == ("personal", State.ACTIVE)
    assert (second.state, second.cause, second.configs) == (State.REFUSED, Cause.CONFLICT, ())
    assert reasons.sentence(second).startswith("Rule personal web already has port")


@pytest.mark.parametrize("protos", [("udp", "udp"), ("udp", "both"), ("both", "tcp"), ("both", "both")])
def test_a_port_is_claimed_for_each_protocol_of_a_rule(protos: tuple[str, str]) -> None:
    first, second = plan(
        [rule(f"proto={proto}", name=f"a-{n}") for n, proto in enumerate(protos)], world(), NOW
    )
    assert (first.state, second.cause) == (State.ACTIVE, Cause.CONFLICT)


def test_a_newcomer_never_takes_the_port_of_what_is_there() -> None:
    newcomer, there = rule(target="personal"), rule(target="work")
    first, second = plan([newcomer, there], world(), NOW, newcomers=[newcomer[:2]])
    assert (first.cause, second.state) == (Cause.CONFLICT, State.ACTIVE)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("srcports=80", "srcports=81"),
        ("srcports=80 listen=10.0.0.1", "srcports=80 listen=10.0.0.2"),
        ("srcports=80 srchosts=10.0.0.0/8", "srcports=80 srchosts=fd00::/8"),
        ("srcports=80", "srcports=80 forwardtype=internal"),
        ("srcports=80", "srcports=80 proto=udp"),
        ("srcports=80 dstports=22", "srcports=81 dstports=22 proto=udp autostart=yes"),
        ("srcports=80", "srcports=80 enabled=no"),
        ("srcports=80 owner=other", "srcports=80"),
    ],
)
def test_other_ports_addresses_families_qubes_and_idle_rules_do_not_conflict(one: str, other: str) -> None:
    found = plan([rule(one, name="a"), rule(other, name="b")], world(), NOW)
    assert Cause.CONFLICT not in {forward.cause for forward in found}


@pytest.mark.parametrize("protos", [("tcp", "tcp"), ("udp", "udp"), ("both", "udp"), ("tcp", "both")])
def test_two_ways_to_one_port_must_agree_about_autostart(protos: tuple[str, str]) -> None:
    rules = [
        rule(f"srcports=80 dstports=22 proto={protos[0]}", name="a"),
        rule(f"srcports=81 dstports=22 autostart=yes proto={protos[1]}", name="b"),
    ]
    _, second = plan(rules, world(), NOW)
    assert second.cause is Cause.CONFLICT
    assert "give both the same autostart" in reasons.sentence(second)


def test_a_rule_that_follows_its_netvm_claims_where_it_is_now() -> None:
    first, second = plan([rule("path=sys-vpn follow-netvm=yes", name="a"), rule(name="b")], world(), NOW)
    assert (first.cause, second.cause) == (Cause.OPEN, Cause.CONFLICT)


def test_a_rule_whose_netvm_changed_claims_where_it_was_agreed_to() -> None:
    first, second = plan([rule("path=sys-vpn", name="a"), rule("via=sys-vpn", name="b")], world(), NOW)
    assert (first.cause, second.cause) == (Cause.NETVM_CHANGED, Cause.CONFLICT)


@pytest.mark.parametrize("follows", ["yes", "no"])
def test_a_rule_whose_target_has_no_netvm_now_claims_where_it_was_agreed_to(follows: str) -> None:
    alone = rule(f"path=sys-vpn follow-netvm={follows}", target="vault")
    first, second = plan([alone, rule("via=sys-vpn")], world(), NOW)
    assert (first.exposed, second.cause) == (None, Cause.CONFLICT)


@pytest.mark.parametrize("path", ["path=", "path= follow-netvm=yes"])
def test_a_rule_without_a_path_claims_where_it_is_now(path: str) -> None:
    first, second = plan([rule(path, name="a"), rule(name="b")], world(), NOW)
    assert (first.exposed, second.cause) == ("sys-net", Cause.CONFLICT)


@pytest.mark.parametrize(
    ("one", "other", "at"),
    [
        ("mode=nft", "mode=nft", "sys-net"),
        ("mode=nft", "mode=qrexec", "sys-net"),
        ("mode=qrexec", "mode=nft", "sys-net"),
        ("mode=nft", "mode=qrexec forwardtype=internal", "sys-firewall"),
        ("mode=nft", "mode=nft via=sys-firewall", "sys-firewall"),
        ("mode=nft listen=10.0.0.1", "mode=nft listen=10.0.0.2", "sys-firewall"),
        ("mode=nft proto=udp srcports=80-90", "mode=nft proto=udp srcports=90-95", "sys-net"),
        ("mode=nft proto=both", "mode=nft proto=udp", "sys-net"),
        ("mode=nft proto=tcp", "mode=nft proto=both", "sys-net"),
        ("mode=nft proto=both", "mode=qrexec", "sys-net"),
    ],
)
def test_a_forward_by_nft_claims_its_port_at_every_hop(one: str, other: str, at: str) -> None:
    _, second = plan([rule(one, name="a"), rule(other, name="b")], nft_world(), NOW)
    conflict = second.finding(Cause.CONFLICT)
    assert conflict is not None
    assert (conflict.qube, conflict.case) == (at, "port")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # By other sides of sys-firewall.
        ("mode=nft", "mode=nft forwardtype=internal"),
        ("mode=nft", "mode=nft proto=udp"),
        ("mode=nft srchosts=10.0.0.0/8", "mode=nft srchosts=fd00::/8"),
        ("mode=nft listen=10.0.0.1", "mode=nft srchosts=fd00::/8"),
        # To the same port of the target.
        ("mode=nft srcports=81 dstports=22", "mode=nft srcports=82 dstports=22"),
        ("mode=nft srcports=81 dstports=22", "autostart=yes srcports=82 dstports=22"),
        ("mode=nft via=sys-firewall", "mode=qrexec"),
    ],
)
def test_other_sides_families_and_protocols_do_not_conflict_by_nft(one: str, other: str) -> None:
    found = plan([rule(one, name="a"), rule(other, name="b")], nft_world(), NOW)
    assert all(forward.finding(Cause.CONFLICT) is None for forward in found)


@pytest.mark.parametrize("mode", ["nft", "qrexec"])
def test_what_comes_to_a_target_by_nft_is_not_taken_on_its_way_by_another(mode: str) -> None:
    """sys-firewall would send on, or give to its listener, what is for its own server."""
    to_firewall = rule("mode=nft srcports=8081 dstports=80", "sys-firewall", "its-own")
    through = rule(f"mode={mode} srcports=80{' forwardtype=internal' * (mode == 'qrexec')}")
    first, second = plan([to_firewall, through], nft_world(), NOW)
    assert (first.state, second.cause) == (State.ACTIVE, Cause.CONFLICT)
    assert reasons.sentence(second).startswith(
        "Rule sys-firewall its-own already has port 80 of sys-firewall"
    )
    planned = plan([to_firewall, through], nft_world(), NOW, newcomers=[to_firewall[:2]])
    assert "port 80 of sys-firewall, and would get what is meant for sys-firewall" in reasons.sentence(
        next(iter(planned))
    )


def test_two_rules_may_lead_to_one_port_of_a_target() -> None:
    rules = [rule("mode=nft srcports=80", name="a"), rule("mode=nft srcports=81 dstports=80", name="b")]
    assert {forward.state for forward in plan(rules, nft_world(), NOW)} == {State.ACTIVE}


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [("1-65535", "1"), ("1-65535", "65535"), ("200-300", "256"), ("255-256", "256-257"), ("256-511", "511")],
)
def test_ports_in_common_are_found_wherever_they_lie_in_two_ranges(wide: str, narrow: str) -> None:
    for one, other in ((wide, narrow), (narrow, wide)):
        found = plan([rule(f"srcports={one}", name="a"), rule(f"srcports={other}", name="b")], world(), NOW)
        assert [forward.cause for forward in found] == [Cause.OPEN, Cause.CONFLICT]


def test_of_several_that_have_a_port_the_first_is_named() -> None:
    ports = {"a": "900", "b": "100", "c": "500", "d": "1-1000"}
    *_, last = plan([rule(f"srcports={each}", name=name) for name, each in ports.items()], world(), NOW)
    (conflict,) = last.stops
    assert conflict.rival is not None
    assert conflict.rival.name == "a"
