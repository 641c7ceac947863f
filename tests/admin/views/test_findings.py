# SPDX-License-Identifier: GPL-2.0-or-later
"""Each check's verdict by itself, whatever another one says."""

from collections.abc import Sequence

import pytest
from worlds import NOW, qube, rule, world

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import ANY, NEW, PolicyCall, PolicyFile, PolicyVerdict
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.views.judged import judged
from qubes_fwd_qrexec.admin.views.showing import all_findings
from qubes_fwd_qrexec.admin.views.tables import Check
from qubes_fwd_qrexec.common.rules import NamedRule

AGREED = "path=sys-firewall,sys-net"


def found(
    named: NamedRule, inventory: Inventory | None = None, *others: NamedRule, installed: str | None = None
) -> dict[str, Check]:
    inventory = inventory or world()
    planned = plan([named, *others], inventory, NOW)
    forward = planned.find(named.target, named.name)
    assert forward is not None
    if installed is None:
        installed = policy.text(planned)
    return {one.name: one for one in all_findings(forward, planned, PolicyFile(installed, NEW), NOW)}


CASES = [
    (rule("srchosts=10.0.0.0/8,fd00::/8"), "sources", "ok", "10.0.0.0/8, fd00::/8 may connect, nobody else"),
    (rule(), "sources", "note", "anybody who can reach the port may connect"),
    (
        rule("srchosts=10.138.0.0/16,gone forwardtype=internal"),
        "sources",
        "note",
        "nobody is let in for gone, as there is no such qube",
    ),
    (rule(AGREED), "path", "ok", "work - sys-firewall - sys-net, as agreed"),
    (rule("follow-netvm=yes"), "path", "ok", "work - sys-firewall - sys-net; the rule follows every change"),
    (
        rule(),
        "path",
        "note",
        "work - sys-firewall - sys-net; no path recorded, so it stays open when the netvm changes: "
        "'qvm-forward confirm work web'",
    ),
    (
        rule("path=sys-vpn"),
        "path",
        "stops",
        "and with follow-netvm=yes the rule follows every change",
    ),
    (
        rule("path=sys-vpn via=sys-net", target="vault"),
        "path",
        "stops",
        "were sys-vpn when the rule was agreed to and are none now; 'qvm-forward confirm vault web' agrees "
        "to the new path, and with follow-netvm=yes the rule follows every change",
    ),
    (
        rule("listen=127.0.0.1 srchosts=127.0.0.1"),
        "side",
        "ok",
        "from sys-net itself, as it listens at a loopback address; from nowhere else",
    ),
    (rule(), "owner", "ok", "made for work"),
    (
        rule("owner="),
        "owner",
        "note",
        "no owner recorded, so clones would be open too: 'qvm-forward confirm work web'",
    ),
    (
        rule("owner=office"),
        "owner",
        "stops",
        "The rule was made for office and came to work by cloning or renaming; 'qvm-forward confirm work "
        "web' makes it a rule of work, 'qvm-forward remove work web' removes it",
    ),
    (rule(), "tunnel", "ok", "neither work nor any of its netvms is marked as a tunnel"),
    (
        rule(target="sys-vpn"),
        "tunnel",
        "stops",
        "and listening at sys-net would bypass it; expose it at a qube behind it with via=QUBE (--via QUBE), "
        "or accept that with bypass-tunnel=yes (--bypass-tunnel)",
    ),
    (
        rule("via=hidden", target="sys-vpn"),
        "tunnel",
        "ok",
        "hidden is behind the target, which is a tunnel, sys-vpn (feature service.vpn-handler-openvpn)",
    ),
    (
        rule(target="hidden"),
        "tunnel",
        "stops",
        "and listening at sys-net would bypass it; expose it at sys-vpn with via=sys-vpn (--via sys-vpn), or "
        "accept that with bypass-tunnel=yes (--bypass-tunnel)",
    ),
    (
        rule("bypass-tunnel=yes", target="hidden"),
        "tunnel",
        "note",
        "bypasses the tunnel sys-vpn (feature service.vpn-handler-openvpn)",
    ),
    (
        rule("forwardtype=internal", target="hidden"),
        "tunnel",
        "ok",
        "sys-vpn is the tunnel itself, sys-vpn (feature service.vpn-handler-openvpn)",
    ),
    (
        rule("via=sys-vpn", target="hidden"),
        "side",
        "ok",
        "outer: by sys-vpn's tunnel alone; not by its uplink, and from no other qube",
    ),
    (
        rule("via=below", target="hidden"),
        "tunnel",
        "ok",
        "below is behind the same tunnel, sys-vpn (feature service.vpn-handler-openvpn)",
    ),
    (rule(target="vault"), "qubes", "stops", "the qube that should listen with via=QUBE (--via QUBE)"),
    (rule("via=gone"), "qubes", "stops", "no qube gone to listen; name another one with via=QUBE"),
    (rule("mode=nft"), "service", "stops", "or send it over qrexec with mode=qrexec"),
    (rule("srcports=1-257 transport=call"), "ports", "stops", "range shorter, or use transport=mux"),
    (rule(), "expiry", "ok", "never"),
    (rule(f"expire={NOW}"), "expiry", "stops", "extends it, 'qvm-forward remove work web' removes it"),
    (rule(f"expire={NOW + 7200}"), "expiry", "ok", "(in 2 h)"),
    (rule("enabled=no"), "switch", "stops", "disabled; 'qvm-forward enable work web' opens it again"),
    (rule(), "policy", "ok", "dom0 allows the call"),
    (rule("enabled=no"), "policy", "stops", "30-forward.policy does not allow it"),
]


@pytest.mark.parametrize(("named", "name", "verdict", "words"), CASES)
def test_each_check_has_its_verdict_and_says_why(
    named: NamedRule, name: str, verdict: str, words: str
) -> None:
    one = found(named, world(qube("below", "sys-vpn")))[name]
    assert (one.verdict, one.text[-len(words) :]) == (verdict, words)


def test_no_finding_hides_another() -> None:
    named = rule(f"owner=office path=sys-vpn enabled=no expire={NOW}", target="hidden")
    stopping = [one.name for one in found(named).values() if one.verdict == "stops"]
    assert stopping == ["switch", "path", "owner", "tunnel", "expiry", "policy"]


def test_what_is_the_matter_with_other_qubes_and_services_is_said_too() -> None:
    stopping = [one.name for one in found(rule("path=sys-vpn via=gone mode=nft")).values()]
    assert stopping == ["qubes", "sources", "path", "owner", "expiry", "policy"]


def test_a_finding_has_its_ways_out_as_commands() -> None:
    one = found(rule("owner=office"))["owner"]
    assert one.ways_out == (
        ("qvm-forward", "confirm", "work", "web"),
        ("qvm-forward", "remove", "work", "web"),
    )
    assert found(rule())["policy"].ways_out == ()
    assert found(rule(), installed="")["policy"].ways_out == (("qvm-forward", "apply"),)


def test_an_enabled_rule_has_no_switch() -> None:
    assert [*found(rule())] == ["sources", "side", "path", "owner", "tunnel", "expiry", "policy"]


def test_policy_that_is_not_written_yet_stops_a_live_forward() -> None:
    one = found(rule(), installed="")["policy"]
    assert (one.verdict, one.text) == (
        "stops",
        "dom0 does not allow the call yet; 'qvm-forward apply' changes that",
    )


@pytest.mark.parametrize("call", ["qubes.ForwardTCP +80+mux", "qubes.ConnectTCP +80"])
def test_policy_that_still_allows_what_is_closed_is_noted(call: str) -> None:
    line = f"{call} sys-net work allow autostart=no notify=no\n"
    one = found(rule("enabled=no"), installed=line)["policy"]
    assert (one.verdict, one.text) == (
        "note",
        "dom0 still allows the call; 'qvm-forward apply' closes it",
    )


def test_a_line_that_another_forward_needs_is_not_this_ones() -> None:
    other = rule("srcports=81 dstports=80", name="other")
    assert found(rule("enabled=no"), None, other)["policy"].verdict == "stops"


@pytest.mark.parametrize("options", ["", "enabled=no"])
def test_policy_that_cannot_be_read_is_not_known(options: str) -> None:
    planned = plan([rule(options)], world(), NOW)
    (forward,) = planned
    verdict = PolicyVerdict(None, "only dom0 can read it")
    one = all_findings(forward, planned, PolicyFile(None, ANY), NOW, verdict)[-1]
    assert (one.name, one.verdict) == ("policy", "note")
    assert one.text.startswith("whether 30-forward.policy allows the call is not known")


def test_a_call_is_not_said_to_be_denied_by_a_file_that_could_not_be_read() -> None:
    class Management:
        def verdicts(self, calls: Sequence[PolicyCall]) -> list[PolicyVerdict]:
            return [PolicyVerdict(None, "only dom0 can read it")] * len(calls)

    forwards = list(plan([rule()], world(), NOW))
    (unread,) = judged(forwards, Management(), PolicyFile(None, ANY)).values()
    (missing,) = judged(forwards, Management(), PolicyFile(None, NEW)).values()
    assert (unread.is_allowed, missing.is_allowed) == (None, False)
