# SPDX-License-Identifier: GPL-2.0-or-later
"""What the fields of Add and Edit hold: from a rule and back to its options."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import assume, given
from rule_strategies import named_rules
from worlds import NOW, rule
from zones import zone

from qubes_fwd_qrexec.admin.editing import edited
from qubes_fwd_qrexec.common.errors import RuleError
from qubes_fwd_qrexec.common.options import Option, split
from qubes_fwd_qrexec.common.rules import ForwardRule, NamedRule
from qubes_fwd_qrexec.window.model.draft import Draft, Ends, Where, clock_text

TYPED = Draft(target=" work ", ports=" 80 ", sources=" 192.168.0.0/16,10.0.0.0/8 ", ends=Ends.NEVER)


@pytest.fixture(scope="module", autouse=True)
def utc() -> Iterator[None]:
    with zone("UTC"):
        yield


def made(draft: Draft) -> ForwardRule:
    return ForwardRule.from_options(draft.options(NOW))


@given(named_rules)
def test_an_untouched_edit_changes_nothing(named: NamedRule) -> None:
    assert Draft.of(named).options(NOW) == []


@given(named_rules)
def test_what_the_fields_show_of_a_rule_makes_the_same_rule_anew(named: NamedRule) -> None:
    old = replace(named.rule, owner=None, path=None, has_ended=False, enabled=True)
    if old.expire is not None:
        assume(old.expire >= 60)  # no time that a user gives is 0
        old = replace(old, expire=old.expire // 60 * 60)
    old = replace(old, comment=old.comment.strip())
    fields = replace(Draft.of(named), base=None)
    assert made(fields) == old


@given(named_rules, named_rules)
def test_an_edit_keeps_what_it_does_not_show(old: NamedRule, new: NamedRule) -> None:
    fields = replace(Draft.of(new), base=old, ends=Ends.NEVER)
    rule = edited(old.rule, fields.options(NOW), NOW)
    assert (rule.owner, rule.path, rule.enabled) == (old.rule.owner, old.rule.path, old.rule.enabled)
    assert replace(
        Draft.of(old._replace(rule=rule)), base=old, name=fields.name, target=fields.target
    ) == replace(
        fields,
        until="",
        comment=fields.comment.strip(),
        sources=fields.sources if not fields.is_anybody else "",
    )


@pytest.mark.parametrize(
    ("draft", "line"),
    [
        (TYPED, "srcports=80 srchosts=10.0.0.0/8,192.168.0.0/16"),
        (
            replace(TYPED, exposed_ports="8080-8081", ports="80-81"),
            "srcports=8080-8081 dstports=80-81 srchosts=10.0.0.0/8,192.168.0.0/16",
        ),
        (replace(TYPED, is_anybody=True), "srcports=80 srchosts=any"),
        (replace(TYPED, sources="10.0.0.0/8; fd00::/8  ,"), "srcports=80 srchosts=10.0.0.0/8,fd00::/8"),
        (
            replace(TYPED, where=Where.NETVM, sources="personal @tag:x"),
            "srcports=80 srchosts=personal,@tag:x forwardtype=internal",
        ),
        (replace(TYPED, is_anybody=True, where=Where.OTHER, via="a"), "srcports=80 srchosts=any via=a"),
        (
            replace(TYPED, is_anybody=True, where=Where.OTHER, via=" a ", is_inside=True),
            "srcports=80 srchosts=any via=a forwardtype=internal",
        ),
        (replace(TYPED, is_anybody=True, via="a", is_inside=True), "srcports=80 srchosts=any"),
        (
            replace(TYPED, is_anybody=True, ends=Ends.MINUTES_5),
            f"srcports=80 srchosts=any expire={NOW + 300}",
        ),
        (replace(TYPED, is_anybody=True, ends=Ends.HOUR), f"srcports=80 srchosts=any expire={NOW + 3600}"),
        (
            replace(TYPED, is_anybody=True, ends=Ends.HOURS_8),
            f"srcports=80 srchosts=any expire={NOW + 28800}",
        ),
        (replace(TYPED, is_anybody=True, until="x"), "srcports=80 srchosts=any"),
        (
            replace(TYPED, is_anybody=True, ends=Ends.UNTIL, until=" 2030-01-31 18:00"),
            "srcports=80 srchosts=any expire=1896112800",
        ),
        (
            replace(
                TYPED, is_anybody=True, proto="both", autostart=True, follow_netvm=True, bypass_tunnel=True
            ),
            "srcports=80 srchosts=any proto=both autostart=yes follow-netvm=yes bypass-tunnel=yes",
        ),
        (
            replace(
                TYPED,
                is_anybody=True,
                mode="qrexec",
                transport="mux",
                proxy="v2",
                limits=" rate:5",
                listen="10.0.0.1 ",
            ),
            "srcports=80 srchosts=any mode=qrexec transport=mux proxy=v2 limits=rate:5 listen=10.0.0.1",
        ),
        (
            replace(TYPED, is_anybody=True, on_expire="drain", comment=" <b>& "),
            "srcports=80 srchosts=any on-expire=drain comment=<b>&",
        ),
    ],
)
def test_fields_make_a_rule(draft: Draft, line: str) -> None:
    assert made(draft) == ForwardRule.parse(f"action=forward {line}")


STORED = rule("srcports=80-80 dstports=8080-8080 srchosts=10.0.0.0/8 via=sys-net expire=1896112837 comment=x")


@pytest.mark.parametrize(
    ("draft", "options"),
    [
        (Draft.of(STORED), {}),
        (replace(Draft.of(STORED), comment=""), {"comment": ""}),
        (replace(Draft.of(STORED), where=Where.OUTERMOST), {"via": ""}),
        (replace(Draft.of(STORED), where=Where.NETVM), {"via": "", "forwardtype": "internal"}),
        (replace(Draft.of(STORED), ports="80"), {"dstports": "80"}),
        (replace(Draft.of(STORED), exposed_ports=""), {"srcports": "8080"}),
        (replace(Draft.of(STORED), ends=Ends.NEVER), {"expire": ""}),
        (replace(Draft.of(STORED), ends=Ends.HOUR), {"expire": str(NOW + 3600)}),
        (replace(Draft.of(STORED), until="2030-01-31 18:01"), {"expire": "1896112860"}),
        (replace(Draft.of(STORED), is_anybody=True), {"srchosts": "any"}),
        (Draft.of(STORED).with_source("fd00::/8", is_in=True), {"srchosts": "10.0.0.0/8,fd00::/8"}),
        (
            replace(Draft.of(STORED), autostart=True, on_expire="drain"),
            {"autostart": "yes", "on-expire": "drain"},
        ),
    ],
)
def test_an_edit_asks_for_what_differs_alone(draft: Draft, options: dict[str, str]) -> None:
    assert {option.name: option.value for option in draft.options(NOW)} == options


def test_a_stored_end_is_shown_to_the_minute_and_kept_to_the_second() -> None:
    fields = Draft.of(STORED)
    assert (fields.ends, fields.until) == (Ends.UNTIL, "2030-01-31 18:00")
    touched = edited(STORED.rule, replace(fields, comment="y").options(NOW), NOW)
    assert (touched.expire, touched.comment) == (1896112837, "y")


def test_the_last_minute_that_a_rule_can_have_is_kept_where_its_year_has_five_digits() -> None:
    last = rule("expire=253402300799")
    with zone("XST-5"):
        assert Draft.of(last).until.startswith("10000-01-01")
        assert Draft.of(last).options(NOW) == []


def test_an_end_that_cannot_be_read_is_an_error_of_its_option() -> None:
    with pytest.raises(RuleError, match="'soon' is not a time such as 8h") as error:
        replace(TYPED, ends=Ends.UNTIL, until="soon").options(NOW)
    assert error.value.options == ("expire",)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ("", {}),
        ("via=sys-vpn", {"where": Where.OTHER, "via": "sys-vpn"}),
        ("forwardtype=internal", {"where": Where.NETVM}),
        ("forwardtype=internal via=a", {"where": Where.OTHER, "via": "a", "is_inside": True}),
        ("via=a forwardtype=internal", {"where": Where.OTHER, "via": "a", "is_inside": True}),
        ("via=a forwardtype=internal via=", {"where": Where.NETVM}),
        ("via=a via=", {"where": Where.OUTERMOST}),
        ("forwardtype=internal forwardtype=external", {"where": Where.OUTERMOST}),
        ("srchosts=any", {"is_anybody": True}),
        ("srchosts=any srchosts=10.0.0.0/8,fd00::/8", {"sources": "10.0.0.0/8, fd00::/8"}),
        ("expire=+8h", {"ends": Ends.HOURS_8}),
        ("expire=5m", {"ends": Ends.MINUTES_5}),
        ("expire=", {"ends": Ends.NEVER}),
        ("expire=never", {"ends": Ends.NEVER}),
        ("expire=18:00", {"ends": Ends.UNTIL, "until": "18:00"}),
        ("expire=1896112837", {"ends": Ends.UNTIL, "until": "2030-01-31 18:00"}),
        ("srcports=80", {}),
        ("srcports=81-81", {"exposed_ports": "81"}),
        ("dstports=81-82", {"ports": "81-82", "exposed_ports": "80"}),
        ("srcports=81 dstports=81", {"ports": "81"}),
        ("mode=nft autostart=yes proxy=v2", {"mode": "nft", "autostart": True, "proxy": "v2"}),
        ("mode=nft mode= autostart=yes autostart=no", {}),
        ("bypass-tunnel=yes follow-netvm=yes", {"bypass_tunnel": True, "follow_netvm": True}),
        (
            "on-expire=drain proto=udp transport=call",
            {"on_expire": "drain", "proto": "udp", "transport": "call"},
        ),
        ("limits=rate:1 listen=::1 comment=a b", {"limits": "rate:1", "listen": "::1", "comment": "a b"}),
        ("enabled=no owner=a path=b action=forward ended=yes", {}),
    ],
)
def test_options_of_a_way_out_fill_the_fields(options: str, changes: dict[str, object]) -> None:
    draft = Draft(target="work", ports="80")
    assert draft.with_options(split(options)) == replace(draft, **changes)  # type: ignore[arg-type]


def test_a_preset_is_put_in_and_taken_out() -> None:
    draft = Draft(sources="192.168.0.0/16;personal")
    more = draft.with_source("fd00::/8", is_in=True)
    assert more.source_list == ["192.168.0.0/16", "personal", "fd00::/8"]
    assert more.with_source("192.168.0.0/16", is_in=True) == more
    assert more.with_source("192.168.0.0/16", is_in=False).sources == "personal, fd00::/8"


@pytest.mark.parametrize(
    ("draft", "fields"),
    [
        (Draft(), ["qube", "dstports", "srchosts"]),
        (TYPED, []),
        (replace(TYPED, sources=" , "), ["srchosts"]),
        (replace(TYPED, sources="", is_anybody=True), []),
        (replace(TYPED, where=Where.OTHER, via=" "), ["via"]),
        (replace(TYPED, ends=Ends.UNTIL), ["expire"]),
    ],
)
def test_what_has_to_be_filled_in_is_missing(draft: Draft, fields: list[str]) -> None:
    assert list(draft.missing) == fields


def test_fields_are_kept_for_what_is_stored_now() -> None:
    other = STORED._replace(rule=replace(STORED.rule, comment="of somebody else"))
    kept = replace(Draft.of(STORED), ports="81").rebased(other)
    assert kept.options(NOW) == [Option("dstports", "81", "dstports"), Option("comment", "x", "comment")]
    assert kept.rebased(None).base is None


def test_times_are_local() -> None:
    with zone("XST-2"):
        assert clock_text(1896112837) == "2030-01-31 20:00"
        fields = replace(Draft.of(STORED), until="2030-01-31 20:01")
        assert fields.options(NOW)[0].value == "1896112860"
