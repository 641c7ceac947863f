# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients by name: whom they let in now, and that a name which says nothing lets in nobody."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import nft_world, only, qube, rule

from qubes_fwd_qrexec.admin import checks, nftpath
from qubes_fwd_qrexec.admin.inventory import Inventory, Qube
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import Cause, Forward, State, Verdict
from qubes_fwd_qrexec.admin.views import entrance, reasons, render
from qubes_fwd_qrexec.common.config import ListenerConfig, Side
from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.values import QubeName, Sources, parse_network

PERSONAL = ("10.137.0.11", "fd09:24ef:4179::a89:b")
GAMES = frozenset({"games"})


def player(name: str, number: int, netvm: str | None = "sys-firewall", **more: object) -> Qube:
    return qube(name, netvm, ip=f"10.137.1.{number}", tags=GAMES, **more)


def internal(sources: str, *extra: Qube, more: str = "", ip6: bool = True) -> Forward:
    return only(rule(f"forwardtype=internal srchosts={sources} {more}"), nft_world(*extra, ip6=ip6))


def told(forward: Forward) -> str:
    (config,) = forward.listener_configs
    return f"{','.join(map(str, config.listen))} <- {config.sources}"


def causes(forward: Forward) -> list[Cause]:
    return [
        found.cause for found in forward.findings if found.cause.value.startswith(("source-", "tag-", "no-s"))
    ]


def test_a_qube_is_let_in_by_its_addresses_and_the_listener_learns_no_name() -> None:
    forward = internal("personal")
    assert forward.state is State.ACTIVE
    assert told(forward) == "0.0.0.0,:: <- 10.137.0.11/32,fd09:24ef:4179::a89:b/128"
    ((_, config),) = forward.configs
    assert "personal" not in str(config)
    assert entrance.let_in(forward) == "personal (10.137.0.11 fd09:24ef:4179::a89:b)"


def test_a_forward_listens_in_the_families_that_its_clients_have() -> None:
    assert told(internal("personal", ip6=False)) == "0.0.0.0 <- 10.137.0.11/32"
    assert told(internal("personal", more="listen=10.137.0.6")) == "10.137.0.6 <- 10.137.0.11/32"
    assert told(internal("personal", more="listen=::")) == ":: <- fd09:24ef:4179::a89:b/128"


def test_names_and_networks_go_together() -> None:
    forward = internal("10.138.0.0/16,personal", ip6=False)
    assert told(forward) == "0.0.0.0 <- 10.137.0.11/32,10.138.0.0/16"
    assert entrance.let_in(forward) == "10.138.0.0/16, personal (10.137.0.11)"


def test_an_address_that_changes_is_followed() -> None:
    moved = qube("personal", "sys-firewall", ip="10.137.9.9")
    assert told(internal("personal", moved)) == "0.0.0.0 <- 10.137.9.9/32"


def test_a_qube_that_is_gone_lets_in_nobody_and_the_others_stay() -> None:
    forward = internal("gone,personal", ip6=False)
    assert told(forward) == "0.0.0.0 <- 10.137.0.11/32"
    assert reasons.notes(forward)[-1:] == ("nobody is let in for gone, as there is no such qube",)
    assert entrance.let_in(forward) == "gone (nobody), personal (10.137.0.11)"


@pytest.mark.parametrize("sources", ["gone", "gone,lost", "@tag:games", "gone,@tag:games"])
def test_where_nobody_is_left_nothing_is_open(sources: str) -> None:
    forward = internal(sources)
    assert (forward.state, forward.cause, forward.is_live) == (State.REFUSED, Cause.NO_SOURCE, False)
    assert reasons.sentence(forward) == (
        "Nobody may connect, as none of the qubes that the rule names is left; name another one that has "
        "sys-firewall as its netvm."
    )
    assert ("qvm-forward", "set", "work", "web", "srchosts=QUBE") in reasons.ways_out(forward)
    by_nft = internal(sources, more="mode=nft")
    assert by_nft.finding(Cause.NO_SOURCE) is not None
    assert not by_nft.is_live


def test_a_qube_elsewhere_is_refused_with_what_would_work() -> None:
    forward = internal("hidden,personal")
    assert (forward.state, forward.cause) == (State.REFUSED, Cause.SOURCE_ELSEWHERE)
    assert reasons.sentence(forward) == (
        "hidden cannot reach sys-firewall, as its netvm is sys-vpn: expose the forward there with "
        "via=sys-vpn (--via sys-vpn), or change the netvm of hidden with "
        "'qvm-prefs hidden netvm sys-firewall'."
    )
    assert internal("hidden", more="via=sys-vpn").state is State.ACTIVE


@pytest.mark.parametrize("netvm", [None, "work"])
def test_a_qube_that_gets_nowhere_is_refused(netvm: str | None) -> None:
    forward = internal("other", qube("other", netvm, ip="10.137.0.20"))
    assert forward.cause is Cause.SOURCE_ELSEWHERE
    assert reasons.sentence(forward) == (
        "other cannot reach sys-firewall, which is not its netvm: change that with "
        "'qvm-prefs other netvm sys-firewall', or name other qubes."
    )


def test_a_tag_lets_in_those_of_its_qubes_that_are_there_and_names_the_others() -> None:
    players = (player("a", 1), player("b", 2), player("c", 3, "sys-vpn"), player("d", 4, None))
    forward = internal("@tag:games", *players, qube("t", klass="TemplateVM", tags=GAMES))
    assert told(forward) == "0.0.0.0 <- 10.137.1.1/32,10.137.1.2/32"
    assert entrance.let_in(forward) == "@tag:games (a 10.137.1.1, b 10.137.1.2)"
    assert "@tag:games does not let in c, d, whose netvm is not sys-firewall" in reasons.notes(forward)
    assert forward.state is State.ACTIVE


def test_a_qube_without_an_address_of_the_family_is_left_out_and_named() -> None:
    forward = internal("a,personal", player("a", 1), more="listen=::")
    assert told(forward) == ":: <- fd09:24ef:4179::a89:b/128"
    assert any(
        note.startswith("nobody is let in for a, as it has no address") for note in reasons.notes(forward)
    )


def test_an_address_that_two_neighbours_have_is_nobodys() -> None:
    twin = qube("twin", "sys-firewall", ip="10.137.0.11")
    forward = internal("personal", twin)
    assert told(forward) == ":: <- fd09:24ef:4179::a89:b/128"
    note = "nobody is let in for personal by an address that twin has too: change that with "
    assert f"{note}'qvm-prefs personal ip ADDRESS'" in reasons.notes(forward)
    assert internal("personal", twin, ip6=False).cause is Cause.NO_SOURCE
    # Elsewhere it would not get through.
    assert told(internal("personal", twin._replace(netvm=QubeName("sys-vpn")), ip6=False)).endswith(
        "<- 10.137.0.11/32"
    )


def test_a_netvm_that_is_let_in_brings_those_behind_it() -> None:
    forward = internal("sys-vpn,personal")
    assert causes(forward) == [Cause.SOURCE_NETVM]
    assert "whoever is behind sys-vpn has its address, and is let in too" in reasons.notes(forward)


def test_a_named_qube_that_cannot_be_read_closes_the_forward() -> None:
    forward = internal("personal,hidden", qube("personal", problem="no answer"))
    assert (forward.cause, forward.is_live) == (Cause.UNREADABLE_QUBE, False)
    unread = internal("@tag:games,personal", player("a", 1)._replace(problem="no answer", netvm=None))
    assert told(unread).endswith("<- 10.137.0.11/32,fd09:24ef:4179::a89:b/128")


def test_clients_by_name_hold_their_port_whatever_addresses_they_have() -> None:
    network = rule("forwardtype=internal via=sys-firewall srchosts=fd00::/8", target="hidden")
    name = rule("forwardtype=internal srchosts=personal")
    forwards = plan([network, name], nft_world(ip6=False), 0)
    assert [forward.finding(Cause.CONFLICT) is not None for forward in forwards] == [False, True]


def by_nft(sources: str, inventory: Inventory) -> tuple[tuple[QubeName, NftConfig], ...]:
    named = rule(f"forwardtype=internal mode=nft srchosts={sources}")
    resolved, *_ = checks.resolved(named, QubeName("sys-firewall"), inventory)
    assert resolved is not None
    path = (QubeName("work"), QubeName("sys-firewall"))
    assert all(
        found.cause.verdict is Verdict.NOTE for found in nftpath.obstacles(named.rule, path, inventory)
    )
    return nftpath.configs(named, resolved, path, Side.VIFS, inventory)


def test_by_nft_the_forward_is_live() -> None:
    forward = internal("personal,@tag:games", player("a", 1), more="mode=nft proto=udp")
    assert forward.state is State.ACTIVE
    assert [qube for qube, _ in forward.configs] == ["work", "sys-firewall"]
    assert not any(name in str(config) for name in ("personal", "games") for _, config in forward.configs)


def test_by_nft_every_hop_and_the_target_learn_addresses_alone() -> None:
    told = by_nft("personal", nft_world())
    assert [qube for qube, _ in told] == ["work", "sys-firewall"]
    assert {str(config.sources) for _, config in told} == {"10.137.0.11/32,fd09:24ef:4179::a89:b/128"}


def test_by_nft_a_name_takes_the_families_that_the_path_has() -> None:
    lacking = nft_world(nft_world().qubes[QubeName("work")]._replace(ip6=None))
    assert by_nft("personal", lacking)[0][1].family == 4
    (found,) = nftpath.obstacles(
        rule("forwardtype=internal srchosts=personal,fd00::/8").rule, (QubeName("work"),), lacking
    )
    assert found.cause is Cause.NO_ADDRESS


def test_by_nft_clients_that_have_a_family_which_the_path_lacks_alone_keep_it_closed() -> None:
    """A clone has the IPv4 address that was set for its origin, and another IPv6 address."""
    twin = qube("twin", "sys-firewall", ip=PERSONAL[0], ip6="fd09:24ef:4179::99")
    systems = nft_world(twin).qubes
    work = systems[QubeName("work")]._replace(ip6=None)
    forward = only(
        rule("mode=nft forwardtype=internal srchosts=personal"), Inventory({**systems, work.name: work})
    )
    assert (forward.state, forward.cause) == (State.REFUSED, Cause.NO_ADDRESS)
    assert reasons.sentence(forward).startswith("work has no IPv6 address")


def test_programs_learn_names_and_what_they_stand_for() -> None:
    data = render.forward_as_json(internal("10.138.0.0/16,personal", ip6=False))
    assert data["rule"]["srchosts"] == "10.138.0.0/16,personal"
    assert data["sources"] == [{"name": "personal", "qube": "personal", "addresses": ["10.137.0.11"]}]


NAMES = st.sampled_from(
    ["personal", "hidden", "gone", "a", "@tag:games", "@tag:none", "10.138.0.0/16", "fd00::/8"]
)


@given(
    st.lists(NAMES, min_size=1, unique=True),
    st.sampled_from(["sys-firewall", "sys-vpn", None]),
    st.booleans(),
)
def test_nobody_is_let_in_but_networks_and_named_neighbours(
    names: list[str], netvm: str | None, ip6: bool
) -> None:
    inventory: Inventory = nft_world(player("a", 1, netvm), ip6=ip6)
    named = rule(f"forwardtype=internal srchosts={','.join(names)}")
    sources, let_in, _ = checks.resolved(named, QubeName("sys-firewall"), inventory)
    allowed = [name for name in names if "/" in name]
    for each in inventory.qubes.values():
        if each.netvm == "sys-firewall" and (
            each.name in names or (each.name == "a" and "@tag:games" in names)
        ):
            allowed += [address for address in (each.ip, each.ip6) if address is not None]
    assert sources == (Sources.of(map(parse_network, allowed)) if allowed else None)
    assert all(inventory.qubes[each.qube].netvm == "sys-firewall" for each in let_in)


def test_what_the_listener_is_told_has_no_words_of_names() -> None:
    ((_, config),) = internal("personal,@tag:games", player("a", 1)).configs
    assert isinstance(config, ListenerConfig)
    assert ListenerConfig.parse(config.key, str(config)) == config
