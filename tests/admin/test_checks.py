# SPDX-License-Identifier: GPL-2.0-or-later
"""What the checks of one rule find: where it is exposed, how it is carried, and what stops it."""

from dataclasses import replace
from typing import Any

import pytest
from worlds import NOW, OURS, only, qube, rule, world

from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import Cause, Forward, State
from qubes_fwd_qrexec.admin.views import reasons, travel
from qubes_fwd_qrexec.admin.views.render import forward_as_json
from qubes_fwd_qrexec.common.config import Service, Side
from qubes_fwd_qrexec.common.rules import Mode, Transport
from qubes_fwd_qrexec.common.values import QubeName


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
    assert (forward.state, reasons.notes(forward)) == (State.ACTIVE, ())


def test_missing_owner_and_path_are_noted() -> None:
    notes = reasons.notes(only(rule("owner=")))
    assert [note.split(",")[0] for note in notes] == ["no owner recorded", "no path recorded"]


def test_auto_becomes_mux_where_the_target_has_our_service() -> None:
    forward = only(rule())
    assert (forward.mode, forward.transport, forward.service) == (
        Mode.QREXEC,
        Transport.MUX,
        Service.FORWARD_TCP,
    )
    assert travel.mode_reason(forward) == "mode=auto is decided when the rule is changed or confirmed"
    assert travel.transport_reason(forward) == "work has qubes-fwd-qrexec"
    assert only(rule("srcports=1-65535")).state is State.ACTIVE


@pytest.mark.parametrize("asked", ["mux", "call"])
def test_our_service_is_used_as_the_rule_says(asked: str) -> None:
    forward = only(rule(f"transport={asked}"))
    assert (forward.transport, forward.service) == (Transport(asked), Service.FORWARD_TCP)
    assert travel.transport_reason(forward) == "the rule says so"


@pytest.mark.parametrize("asked", ["", "transport=mux"])
def test_mux_carries_who_the_client_is(asked: str) -> None:
    forward = only(rule(f"proxy=v2 {asked}"))
    assert forward.transport is Transport.MUX
    (config,) = forward.listener_configs
    assert config.proxy == "v2"


def test_a_target_without_our_service_is_reached_by_the_stock_one_and_the_reason_warns() -> None:
    forward = only(rule(target="personal"))
    assert (forward.transport, forward.service) == (Transport.CALL, Service.CONNECT_TCP)
    assert "the rest of what the client sends is lost" in travel.transport_reason(forward)


def test_udp_goes_over_a_service_of_its_own_in_mux_calls() -> None:
    forward = only(rule("proto=udp srcports=53-54 proxy=v2 autostart=yes limits=rate:5"))
    assert (forward.state, forward.service, forward.transport) == (
        State.ACTIVE,
        Service.FORWARD_UDP,
        Transport.MUX,
    )
    ((exposed, config),) = forward.configs
    assert (exposed, config.key) == ("sys-net", "udp.work.web")
    assert str(config) == (
        "version=1 service=qubes.ForwardUDP transport=mux side=outer listen=0.0.0.0,:: srcports=53-54 "
        "dstports=53-54 srchosts=any proxy=v2 limits=rate:5"
    )


@pytest.mark.parametrize("transport", ["mux", "call"])
def test_a_listener_is_told_of_tcp_and_udp_of_one_rule_apart(transport: str) -> None:
    forward = only(rule(f"proto=both transport={transport} on-expire=drain expire=1893456000"))
    assert (forward.service, forward.transport) == (Service.FORWARD_TCP, Transport(transport))
    tcp, udp = forward.listener_configs
    assert (tcp.key, tcp.service, tcp.transport) == ("fwd.work.web", Service.FORWARD_TCP, transport)
    assert (udp.key, udp.service, udp.transport) == ("udp.work.web", Service.FORWARD_UDP, Transport.MUX)
    assert replace(udp, service=tcp.service, transport=tcp.transport) == tcp


@pytest.mark.parametrize("proto", ["udp", "both"])
def test_nothing_carries_udp_but_our_service(proto: str) -> None:
    forward = only(rule(f"proto={proto}", target="personal"))
    assert (forward.cause, forward.configs) == (Cause.NO_SERVICE, ())
    assert forward.decisive.case == "udp"
    assert reasons.sentence(forward).startswith("personal does not offer qubes.ForwardUDP")
    assert "install qubes-fwd-qrexec in its template debian-12 and restart personal" in reasons.sentence(
        forward
    )
    older = qube("work", "sys-firewall", features={"supported-rpc.qubes.ForwardTCP": "1"})
    forward = only(rule(f"proto={proto}"), world(older))
    assert (forward.cause, forward.configs) == (Cause.NO_SERVICE, ())
    assert "update qubes-fwd-qrexec in work" in reasons.sentence(forward)
    assert only(rule("proto=tcp"), world(older)).is_live


def test_each_service_that_is_missing_for_both_is_named() -> None:
    forward = only(rule("proto=both transport=mux", target="personal"))
    assert [stop.case for stop in forward.stops] == ["udp", "transport=mux"]
    windows = qube("work", "sys-firewall", features={"os": "Windows"})
    forward = only(rule("proto=both"), world(windows))
    assert [stop.case for stop in forward.stops] == ["udp-system", "system"]


@pytest.mark.parametrize("proto", ["udp", "both"])
def test_no_udp_is_sent_to_a_target_that_was_started_before_its_template_had_our_service(proto: str) -> None:
    work = qube("work", "sys-firewall", template=QubeName("fedora-42"))
    (forward,) = plan([rule(f"proto={proto}")], world(work), NOW, stock={QubeName("work")})
    assert (forward.cause, forward.configs) == (Cause.NO_SERVICE, ())
    assert reasons.sentence(forward) == (
        "work was started before its template offered qubes.ForwardUDP, without which no UDP gets there over "
        "qrexec; restart work, or send it by nft with mode=nft."
    )
    (tcp,) = plan([rule()], world(work), NOW, stock={QubeName("work")})
    assert tcp.service is Service.CONNECT_TCP
    halted = world(work._replace(is_running=False))
    (forward,) = plan([rule(f"proto={proto}")], halted, NOW, stock={QubeName("work")})
    assert forward.is_live


def test_what_only_linux_has_is_not_to_be_installed_elsewhere() -> None:
    features = {"os": "Windows", "supported-rpc.qubes.ConnectTCP": "1"}
    windows = world(qube("work", "sys-firewall", klass="StandaloneVM", features=features))
    for options in ("", "proto=udp", "proto=both", "transport=mux", "proxy=v2", "mode=nft proto=udp"):
        forward = only(rule(options), windows)
        assert forward.is_live == (options == "")
        found = forward.decisive if options else forward.finding(Cause.STOCK_SERVICE)
        said = reasons.sentence(forward, found)
        assert "runs Windows" in said
        assert "install" not in said


def test_limits_are_what_the_listener_is_told() -> None:
    forward = only(rule("limits=connections:9,per-source:3,rate:5"))
    assert forward.state is State.ACTIVE
    (config,) = forward.listener_configs
    assert str(config).endswith(" limits=connections:9,per-source:3,rate:5")


def test_a_bypassed_tunnel_is_labelled() -> None:
    forward = only(rule("bypass-tunnel=yes", target="hidden"))
    assert forward.state is State.ACTIVE
    assert "bypasses the tunnel sys-vpn (feature service.vpn-handler-openvpn)" in reasons.notes(forward)


@pytest.mark.parametrize("via", ["sys-vpn", "below"])
def test_at_the_tunnel_or_behind_it_is_fine(via: str) -> None:
    forward = only(rule(f"via={via}", target="hidden"), world(qube("below", "sys-vpn")))
    assert (forward.state, forward.exposed) == (State.ACTIVE, via)


@pytest.mark.parametrize(
    ("text", "target", "exposed", "side"),
    [
        ("", "work", "sys-net", Side.OUTER),
        ("forwardtype=internal", "work", "sys-firewall", Side.VIFS),
        ("via=personal", "work", "personal", Side.UPLINK),
        ("via=sys-vpn", "hidden", "sys-vpn", Side.OUTER),
        ("via=sys-vpn forwardtype=internal", "vault", "sys-vpn", Side.VIFS),
    ],
)
def test_each_forward_has_its_side_and_its_listener_is_told(
    text: str, target: str, exposed: str, side: Side
) -> None:
    forward = only(rule(text, target=target))
    (config,) = forward.listener_configs
    assert (forward.exposed, forward.side, config.side) == (exposed, side, side)
    assert forward_as_json(forward)["side"] == side


def test_a_tunnel_beside_network_devices_is_gone_round_from_outside_alone() -> None:
    marked = world(qube("sys-net", features={"forward.tunnel": "1"}))
    refused = only(rule(), marked)
    assert refused.cause is Cause.TUNNEL
    assert "nothing tells its tunnel from the LAN beside it" in reasons.sentence(refused)
    assert (
        reasons.notes(only(rule("bypass-tunnel=yes"), marked))[-1]
        == "bypasses the tunnel sys-net (feature forward.tunnel)"
    )
    assert only(rule("forwardtype=internal via=sys-net"), marked).is_live


def test_after_a_netvm_change_the_side_that_changes_is_named() -> None:
    moved = world(qube("work", "sys-vpn", features=OURS))
    reason = reasons.sentence(only(rule("path=sys-firewall,sys-net via=sys-vpn"), moved))
    assert "opens it at" not in reason
    reason = reasons.sentence(only(rule("path=sys-firewall,sys-net forwardtype=internal"), moved))
    assert "which opens it at sys-vpn (vifs side) and no longer at sys-firewall (vifs side)" in reason
    gone = world(qube("work", "sys-firewall", features=OURS), qube("sys-net", "outmost"), qube("outmost"))
    reason = reasons.sentence(only(rule("path=sys-firewall,sys-net"), gone))
    assert "opens it at outmost (outer side) and no longer at sys-net (outer side)" in reason


@pytest.mark.parametrize(
    ("features", "cause"),
    [
        ({"service.qubes-tunnel-openvpn": "1"}, Cause.TUNNEL),
        ({"service.wireguard": "1"}, Cause.TUNNEL),
        ({"service.qubes-tunnel-openvpn": ""}, Cause.OPEN),
        ({}, Cause.OPEN),
    ],
)
def test_vpn_services_mark_a_tunnel(features: dict[str, str], cause: Cause) -> None:
    known = world(qube("sys-wg", "sys-firewall", features=features), qube("work", "sys-wg", features=OURS))
    assert only(rule(), known).cause is cause


def test_what_may_be_a_tunnel_is_hinted_at_until_somebody_has_said() -> None:
    def hints(text: str = "", **features: str) -> tuple[str, ...]:
        wg = qube("sys-wg", "sys-firewall", features=features)
        return reasons.hints(only(rule(text), world(wg, qube("work", "sys-wg", features=OURS))))

    (hint,) = hints()
    assert "'qvm-forward tunnel mark sys-wg'" in hint
    assert hints("via=sys-wg") == (hint,)
    assert hints("forwardtype=internal") == (hint,)
    assert hints("via=sys-wg", **{"forward.tunnel": "1"}) == ()
    assert hints(**{"forward.tunnel": ""}) == ()
    assert reasons.hints(only(rule())) == ()


def test_what_a_template_learns_is_in_a_target_that_starts_after_it() -> None:
    """And in a qube that has the package itself at once."""

    def planned(text: str = "", **more: Any) -> Forward:
        work = qube("work", "sys-firewall", template=QubeName("fedora-42"), **more)
        return plan([rule(text)], world(work), NOW, stock={QubeName("work")}).forwards[0]

    before = planned()
    assert (before.service, before.transport) == (Service.CONNECT_TCP, Transport.CALL)
    assert travel.transport_reason(before).startswith(
        "work was started before its template offered qubes.ForwardTCP"
    )
    assert travel.transport_reason(before).endswith("restart work")
    assert planned("transport=mux").cause is Cause.NO_SERVICE
    assert planned(is_running=False).service is Service.FORWARD_TCP
    assert planned(features=OURS).service is Service.FORWARD_TCP


def test_a_move_behind_a_tunnel_is_not_answered_with_a_confirm_that_is_refused() -> None:
    moved = world(qube("work", "sys-vpn", features=OURS))
    named = rule("path=sys-firewall,sys-net")
    forward = only(named, moved)
    assert forward.cause is Cause.NETVM_CHANGED
    assert "where it would be refused. work is behind a tunnel" in reasons.sentence(forward)
    assert reasons.sentence(forward).endswith(
        "After that 'qvm-forward confirm work web' agrees to the new path."
    )
    set_via, set_bypass, confirm = reasons.ways_out(forward)
    assert confirm == ("qvm-forward", "confirm", "work", "web")
    for command in (set_via, set_bypass):
        assert command[:4] == ("qvm-forward", "set", "work", "web")
        agreed = rule(f"{command[4]} path=sys-vpn,sys-firewall,sys-net")
        assert only(agreed, moved).is_live


@pytest.mark.parametrize(
    ("text", "cause", "ways_out"),
    [
        ("enabled=no", Cause.DISABLED, ["enable work web"]),
        ("expire=1", Cause.EXPIRED, ["set work web expire=+8h", "remove work web"]),
        ("owner=office", Cause.CLONED, ["confirm work web", "remove work web"]),
        ("path=sys-vpn", Cause.NETVM_CHANGED, ["confirm work web", "set work web follow-netvm=yes"]),
        ("", Cause.OPEN, []),
    ],
)
def test_the_ways_out_of_a_state_are_commands(text: str, cause: Cause, ways_out: list[str]) -> None:
    forward = only(rule(text))
    assert forward.cause is cause
    assert [" ".join(command) for command in reasons.ways_out(forward)] == [
        f"qvm-forward {way}" for way in ways_out
    ]
    assert forward_as_json(forward)["ways_out"] == [list(command) for command in reasons.ways_out(forward)]


def test_behind_a_tunnel_nothing_else_is_suspected_of_being_one() -> None:
    inner = world(qube("inner", "sys-vpn"), qube("work", "inner", features=OURS))
    forward = only(rule("via=inner"), inner)
    assert forward.is_live
    assert reasons.hints(forward) == ()


@pytest.mark.parametrize(("via", "suspected"), [("sys-net", ["near", "far"]), ("near", ["near"])])
def test_each_netvm_up_to_the_exposed_qube_might_be_a_tunnel(via: str, suspected: list[str]) -> None:
    netvms = (
        qube("near", "far", provides_network=True),
        qube("far", "sys-firewall", provides_network=True),
        qube("work", "near", features=OURS),
    )
    found = only(rule(f"via={via}"), world(*netvms)).findings
    assert [one.qube for one in found if one.cause is Cause.PERHAPS_TUNNEL] == suspected


@pytest.mark.parametrize("via", ["fedora-42", "dom0", "work"])
def test_of_a_qube_that_cannot_listen_nothing_else_is_said(via: str) -> None:
    forward = only(rule(f"via={via}"))
    assert (forward.exposed, forward.cause, forward.configs) == (via, Cause.UNFIT_QUBE, ())
    for cause in (Cause.SIDE, Cause.NO_TUNNEL, Cause.EXPOSED_HALTED):
        assert forward.finding(cause) is None


def test_an_unfit_target_is_asked_for_no_service() -> None:
    forward = only(rule(target="fedora-42"))
    assert (forward.service, [stop.cause for stop in forward.stops]) == (
        None,
        [Cause.UNFIT_QUBE, Cause.NO_NETVM],
    )
