# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever is the matter with a rule has words, and nothing that stops it is live."""

from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import BY_NFT, NOW, OURS, qube, rule, world

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import NEW, PolicyFile
from qubes_fwd_qrexec.admin.inventory import Qube
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import State, Verdict
from qubes_fwd_qrexec.admin.views import parser, reasons, showing
from qubes_fwd_qrexec.common.rules import Mode, NamedRule
from qubes_fwd_qrexec.common.values import QubeName

NAMES = ("work", "personal", "sys-vpn", "sys-firewall", "gone")
PARSER = parser.build()


def either(*texts: str) -> st.SearchStrategy[str]:
    """One of some options, or none as often as all of them together."""
    return st.one_of(st.just(""), st.sampled_from(texts))


rules = st.builds(
    lambda target, name, *options: rule(" ".join(options), target, name),
    st.sampled_from(NAMES),
    st.sampled_from("abc"),
    either("srcports=1-300", "srcports=81"),
    either("enabled=no"),
    either(f"expire={NOW}", f"expire={NOW + 60}"),
    either("owner=", "owner=office"),
    either("path=sys-vpn", "path=sys-firewall,sys-net"),
    either("via=work", "via=sys-net", "via=dom0", "via=gone", "via=personal"),
    either("mode=nft", "transport=mux", "transport=call", "proxy=v2", "autostart=yes"),
    either("bypass-tunnel=yes", "follow-netvm=yes", "forwardtype=internal"),
    either(
        *("srchosts=fd00::/8", "srchosts=10.0.0.0/8", "listen=127.0.0.1"),
        *(f"srchosts={names} forwardtype=internal" for names in ("personal", "gone", "sys-vpn,@tag:anon-vm")),
    ),
)
qubes = st.builds(
    lambda name, netvm, klass, features, tags, more: qube(
        name, netvm, klass=klass, features=features, tags=tags, template=QubeName("fedora-42"), **more
    ),
    st.sampled_from(NAMES[:4]),
    st.sampled_from((None, "sys-net", "sys-firewall", "sys-vpn", "gone")),
    st.sampled_from(("AppVM", "AppVM", "AppVM", "DispVM", "TemplateVM", "RemoteVM")),
    st.sampled_from(
        ({}, OURS, BY_NFT, {"forward.tunnel": "1"}, {"os": "Windows", "qrexec": "1"}, {"qrexec": ""})
    ),
    st.sampled_from((frozenset(), frozenset({"anon-vm"}), frozenset({"anon-gateway"}))),
    st.sampled_from(({}, {"is_running": False}, {"template_for_dispvms": True}, {"problem": "no answer"})),
)


@settings(deadline=None, max_examples=150, database=None)
@given(
    st.lists(rules, max_size=4, unique_by=lambda named: named[:2]), st.lists(qubes, max_size=3), st.booleans()
)
def test_every_finding_has_words_and_what_stops_has_a_way_out(
    some: list[NamedRule], changed: list[Qube], is_held: bool
) -> None:
    planned = plan(some, world(*changed), NOW, stock=[QubeName("work")])
    planned = planned.held() if is_held else planned
    for forward in planned:
        is_live = forward.state in (State.ACTIVE, State.WAITING)
        assert is_live == forward.is_live == (not forward.stops)
        assert bool(policy.lines(forward)) == (is_live and forward.mode is Mode.QREXEC)
        assert not (is_held and is_live)
        for finding in forward.findings:
            if finding.cause.verdict is Verdict.OK:
                continue
            assert reasons.sentence(forward, finding)
            for program, *arguments in reasons.ways_out(forward, finding):
                assert program in ("qvm-forward", "qvm-start", "qvm-prefs", "qvm-service")
                if program == "qvm-forward":
                    PARSER.parse_args(arguments)
        assert reasons.sentence(forward)
        assert is_live or reasons.ways_out(forward)
        shown = showing.all_findings(forward, planned, PolicyFile(policy.text(planned), NEW), NOW)
        assert {one.name for one in shown if one.verdict is Verdict.STOPS} or is_live
