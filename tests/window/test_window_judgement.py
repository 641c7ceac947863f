# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of a draft, field by field, and what would mend it."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from worlds import NOW, nft_world, qube, rule, world

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.seen import Seen
from qubes_fwd_qrexec.admin.snapshot import Snapshot, read_rules
from qubes_fwd_qrexec.admin.states import Cause, State
from qubes_fwd_qrexec.admin.views.times import print_expire
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.window.model.draft import Draft, Ends, Where
from qubes_fwd_qrexec.window.model.judgement import Judgement, judge

DRAFT = Draft(target="work", ports="80", sources="192.168.0.0/16")
INTERNAL = replace(DRAFT, where=Where.NETVM, sources="personal")
STORED = rule("srchosts=10.0.0.0/8 mode=qrexec path=sys-firewall,sys-net")
EDIT = replace(Draft.of(STORED), comment="x")
OPENS, NOT_YET, REFUSED = "This opens at once:", "Something is not right yet.", "This cannot be opened."


def snapshot(*stored: NamedRule, inventory: Inventory | None = None) -> Snapshot:
    inventory = inventory or world()
    return Snapshot(inventory, read_rules(inventory)).changed(
        {named[:2]: str(named.rule) for named in stored}
    )


def judged(draft: Draft, *stored: NamedRule, inventory: Inventory | None = None) -> Judgement:
    return judge(draft, snapshot(*stored, inventory=inventory), NOW)


def stored_for(draft: Draft) -> tuple[NamedRule, ...]:
    return () if draft.base is None else (draft.base,)


def test_a_new_rule_that_is_fine_says_what_it_opens() -> None:
    found = judged(DRAFT)
    assert found.named is not None
    assert (found.is_fine, found.button, found.headline, found.named.name) == (True, "_Open", OPENS, "tcp-80")
    sentence, end = found.lines
    assert sentence.startswith(
        "Connections to port 80 of sys-net (outer side) from 192.168.0.0/16 reach port 80"
    )
    assert end == f"It ends {print_expire(NOW + 3600, NOW)}."
    assert found.notes[0] == "It goes over qrexec, as work does not offer qubes.ForwardNft."
    assert found.notes[1].startswith("The server in work sees every client as 127.0.0.1")
    assert found.seen == Seen(None, ("sys-firewall", "sys-net"))
    assert found.named.rule.expire == NOW + 3600


def test_one_by_nft_says_why_and_at_what_price() -> None:
    notes = judged(DRAFT, inventory=nft_world()).notes
    assert notes[0] == "It goes by nft, as packets can go sys-net - sys-firewall - work."
    assert any("the network stack of work itself" in note.lower() for note in notes)


def test_an_edit_is_stored_by_what_differs() -> None:
    found = judged(EDIT, STORED)
    assert (found.is_fine, found.button, found.headline) == (True, "_Save", OPENS)
    assert found.named == STORED._replace(rule=replace(STORED.rule, comment="x"))
    assert found.seen == Seen(str(STORED.rule), ("sys-firewall", "sys-net"))
    assert len(found.lines) == 1


def test_an_edit_that_changes_nothing_is_not_stored() -> None:
    found = judged(Draft.of(STORED), STORED)
    assert (found.is_fine, found.headline) == (False, "Nothing has been changed yet.")
    assert not judged(replace(Draft.of(STORED), ports="80-80"), STORED).is_fine


ASLEEP = rule("enabled=no mode=qrexec")
OVER = rule(f"expire={NOW - 60} mode=qrexec")


@pytest.mark.parametrize(
    ("draft", "button", "headline"),
    [
        (DRAFT, "_Open", OPENS),
        (replace(DRAFT, is_anybody=True), "_Open to anybody", OPENS),
        (EDIT, "_Save", OPENS),
        (replace(EDIT, is_anybody=True), "_Save: open to anybody", OPENS),
        (replace(Draft.of(ASLEEP), comment="x"), "_Save", "This stays closed, because it is disabled:"),
        (replace(Draft.of(OVER), comment="x"), "_Save", "This stays closed, because it has expired:"),
        (replace(Draft.of(OVER), ends=Ends.HOURS_8), "_Save: open to anybody", OPENS),
        (
            replace(DRAFT, is_anybody=True, ports=""),
            "_Open to anybody",
            "Something still has to be filled in.",
        ),
        (replace(DRAFT, is_anybody=True, target="vault"), "_Open to anybody", REFUSED),
        (replace(DRAFT, target="asleep"), "_Open", "This opens, and waits for a qube:"),
        (
            replace(Draft.of(rule("path=sys-vpn mode=qrexec")), comment="x"),
            "_Save: open to anybody",
            "This stays closed until you confirm it:",
        ),
        (
            replace(Draft.of(rule("via=gone mode=qrexec")), comment="x"),
            "_Save: open to anybody",
            "This stays closed, as it was:",
        ),
        (replace(EDIT, where=Where.OTHER, via="gone"), "_Save", "This cannot be saved."),
    ],
)
def test_the_button_says_what_it_does(draft: Draft, button: str, headline: str) -> None:
    found = judged(
        draft, *stored_for(draft), inventory=world(qube("asleep", "sys-firewall", is_running=False))
    )
    assert (found.button, found.headline) == (button, headline)


def test_what_is_held_is_saved_and_opens_later() -> None:
    held = snapshot()
    held = held._replace(installed=held.installed._replace(text=policy.hold_text(NOW)))
    found = judge(replace(DRAFT, is_anybody=True), held, NOW)
    assert (found.is_fine, found.button) == (True, "_Save: open to anybody")
    assert found.headline == "This stays closed, because everything is held:"


@pytest.mark.parametrize(
    ("draft", "missing"),
    [
        (Draft(), ("qube", "dstports", "srchosts")),
        (replace(DRAFT, ports="", exposed_ports="80"), ("dstports",)),
        (replace(DRAFT, sources=""), ("srchosts",)),
        (replace(DRAFT, where=Where.OTHER), ("via",)),
        (replace(DRAFT, ends=Ends.UNTIL), ("expire",)),
        (replace(EDIT, ports=""), ("dstports",)),
    ],
)
def test_what_is_empty_is_to_be_filled_in_and_no_fault(draft: Draft, missing: tuple[str, ...]) -> None:
    found = judged(draft, *stored_for(draft))
    assert (found.missing, found.faults, found.is_fine) == (missing, {}, False)


# Fields, and what is found wrong: each field with a part of its text, and the labels of what would mend it.
FAULTS = [
    (
        replace(
            DRAFT,
            target="wrk",
            ports="x",
            sources="10.0.0.1/8",
            comment="ü",
            name="A",
            limits="1",
            listen="a",
        ),
        {
            "qube": "there is no qube 'wrk'; did you mean 'work'?",
            "dstports": "'x' is not a port",
            "srchosts": "10.0.0.0/8 would be right",
            "comment": "printable ASCII",
            "name": "'A' is not a rule's name",
            "limits": "a list of limits",
            "listen": "an IPv4 or IPv6 address",
        },
        [],
    ),
    (replace(DRAFT, sources="<b>&"), {"srchosts": "'<b>&' is not"}, []),
    (replace(DRAFT, exposed_ports="0", ports="80"), {"srcports": "'0' is not"}, []),
    (replace(DRAFT, exposed_ports="80-81"), {"srcports": "same number", "dstports": "same number"}, []),
    (replace(DRAFT, sources="any"), {"srchosts": "To let in everybody, choose"}, []),
    (replace(DRAFT, sources="0.0.0.0/0"), {"srchosts": "lets in everybody"}, []),
    (replace(DRAFT, sources="10.0.0.0/8 any"), {"srchosts": "To let in everybody, choose"}, []),
    (
        replace(DRAFT, ports="", ends=Ends.UNTIL, until="soon", limits="x"),
        {"expire": "'soon' is not a time", "limits": "a list of limits"},
        [],
    ),
    (replace(DRAFT, ends=Ends.UNTIL, until="2001-01-31"), {"expire": "already passed"}, []),
    (replace(DRAFT, name="web"), {"name": "a rule of that name"}, []),
    (replace(DRAFT, name="tunnel"), {"name": "marks a tunnel"}, []),
    (replace(INTERNAL, sources="persona"), {"srchosts": "did you mean 'personal'?"}, []),
    (replace(EDIT, where=Where.NETVM, sources="gone"), {"srchosts": "there is no qube gone"}, []),
    (
        replace(DRAFT, sources="personal"),
        {"srchosts": "lets in no qubes", "forwardtype": "lets in no qubes"},
        ["Expose it only to other qubes"],
    ),
    (
        replace(DRAFT, mode="nft", proxy="v2"),
        {"mode": "PROXY header", "proxy": "PROXY header"},
        ["Send it over qrexec", "Send no PROXY header"],
    ),
    (
        replace(DRAFT, mode="nft", transport="mux"),
        {"mode": "about qrexec", "transport": "about qrexec"},
        ["Choose the transport automatically", "Send it over qrexec"],
    ),
    (
        replace(DRAFT, mode="nft", autostart=True),
        {"mode": "halted qube", "autostart": "halted qube"},
        ["Send it over qrexec", "Do not let connections start the qube"],
    ),
    (
        replace(DRAFT, transport="call", proxy="v2"),
        {"transport": "mux calls", "proxy": "mux calls"},
        ["Use mux calls", "Send no PROXY header"],
    ),
    (
        replace(DRAFT, proto="udp", proxy="v1"),
        {"proto": "TCP alone", "proxy": "TCP alone"},
        ["Use PROXY version 2"],
    ),
    (
        replace(DRAFT, proto="udp", transport="call"),
        {"proto": "single calls", "transport": "single calls"},
        ["Choose the transport automatically"],
    ),
    (
        replace(DRAFT, listen="::1"),
        {"listen": "do not mix", "srchosts": "do not mix"},
        ["Listen on every address"],
    ),
]


@pytest.mark.parametrize(("draft", "faults", "mends"), FAULTS)
def test_each_fault_is_shown_at_its_field(draft: Draft, faults: Mapping[str, str], mends: list[str]) -> None:
    found = judged(draft, STORED)
    assert found.faults.keys() == faults.keys()
    for field, text in faults.items():
        assert text in found.faults[field]
    assert [mend.label for mend in found.mends] == mends
    assert (found.is_fine, found.headline) == (False, NOT_YET)


@pytest.mark.parametrize("draft", [draft for draft, _, mends in FAULTS if mends])
def test_what_mends_a_contradiction_does(draft: Draft) -> None:
    for mend in judged(draft).mends:
        mended = judged(draft.with_options(mend.options))
        assert not set(mended.faults.values()) & set(judged(draft).faults.values())


# Fields that are refused: the cause, the field that it is about, and what would mend it.
REFUSALS = [
    (replace(DRAFT, target="hidden"), Cause.TUNNEL, "forwardtype", ["Expose it at sys-vpn"]),
    (replace(DRAFT, target="vault"), Cause.NO_NETVM, "forwardtype", ["Expose it at another qube…"]),
    (replace(DRAFT, target="dom0"), Cause.UNFIT_QUBE, "qube", []),
    (
        replace(DRAFT, where=Where.OTHER, via="gone"),
        Cause.NO_SUCH_QUBE,
        "via",
        ["Expose it at another qube…"],
    ),
    (
        replace(DRAFT, target="personal", mode="nft"),
        Cause.NO_NFT_SERVICE,
        "mode",
        ["Send it over qrexec"],
    ),
    (replace(DRAFT, target="personal", proto="udp"), Cause.NO_SERVICE, "proto", ["Send it by nft"]),
    (
        replace(DRAFT, target="personal", transport="mux"),
        Cause.NO_SERVICE,
        "transport",
        ["Choose the transport automatically"],
    ),
    (replace(DRAFT, target="personal", proxy="v2"), Cause.NO_SERVICE, "proxy", ["Send no PROXY header"]),
    (
        replace(DRAFT, where=Where.OTHER, via="vault", mode="nft"),
        Cause.NO_IP_PATH,
        "via",
        ["Expose it at one of its own netvms", "Send it over qrexec"],
    ),
    (
        replace(DRAFT, ports="80", exposed_ports="8000"),
        Cause.CONFLICT,
        "srcports",
        ["Use another exposed port…", "Copy “qvm-forward disable personal web”"],
    ),
    (
        replace(INTERNAL, sources="hidden"),
        Cause.SOURCE_ELSEWHERE,
        "srchosts",
        ["Expose it at sys-vpn", "Copy “qvm-prefs hidden netvm sys-firewall”"],
    ),
    (
        replace(DRAFT, ports="1000-1300", transport="call"),
        Cause.TOO_LARGE,
        "dstports",
        ["Use another exposed port…"],
    ),
]


@pytest.mark.parametrize(("draft", "cause", "field", "mends"), REFUSALS)
def test_each_refusal_is_shown_at_the_field_that_it_is_about(
    draft: Draft, cause: Cause, field: str, mends: list[str]
) -> None:
    found = judged(draft, rule("srcports=8000 mode=qrexec", "personal"))
    assert found.forward is not None
    assert (found.forward.cause, found.forward.state) == (cause, State.REFUSED)
    assert (found.headline, list(found.faults), found.notes) == (REFUSED, [field], ())
    assert ([mend.label for mend in found.mends], found.is_fine) == (mends, False)


def test_a_tunnel_is_bypassed_only_by_a_field_of_its_own() -> None:
    hidden = replace(DRAFT, target="hidden")
    assert judged(hidden).asks_bypass
    accepted = judged(replace(hidden, bypass_tunnel=True))
    assert (accepted.is_fine, accepted.asks_bypass) == (True, True)
    assert "Bypasses the tunnel sys-vpn (feature service.vpn-handler-openvpn)." in accepted.notes
    (at_tunnel,) = judged(hidden).mends
    assert judged(hidden.with_options(at_tunnel.options)).is_fine
    assert not judged(DRAFT).asks_bypass


def test_what_mends_a_refusal_does() -> None:
    for draft, *_ in REFUSALS:
        for mend in judged(draft).mends:
            if mend.options:
                assert judged(draft.with_options(mend.options)).lines != judged(draft).lines


def test_a_rule_that_was_changed_meanwhile_is_shown_as_it_was_and_is() -> None:
    other = STORED._replace(rule=replace(STORED.rule, comment="<b>&"))
    found = judged(EDIT, other)
    assert (found.headline, found.is_fine) == ("This rule has been changed in the meantime.", False)
    assert found.lines == (f"You saw: {STORED.rule}", f"It is now: {other.rule}")
    take, keep = found.mends
    assert (take.label, take.draft) == ("Use what is stored now", Draft.of(other))
    assert (keep.label, keep.draft) == ("Keep what I entered", EDIT.rebased(other))
    assert judged(EDIT.rebased(other), other).is_fine


def test_a_rule_that_was_removed_meanwhile_can_be_made_anew() -> None:
    found = judged(EDIT)
    assert found.headline == "This rule has been removed in the meantime."
    (make,) = found.mends
    assert make.draft is not None
    anew = judged(make.draft)
    assert (anew.is_fine, anew.named and anew.named.name) == (True, "web")


def test_a_rule_that_was_broken_meanwhile_is_shown_without_what_a_screen_would_take_for_a_command() -> None:
    broken = snapshot().changed({STORED[:2]: "b\x1broken"})
    found = judge(EDIT, broken, NOW)
    assert (found.mends, found.is_fine) == ((), False)
    assert found.lines[1] == "It is now: b\\x1broken"
