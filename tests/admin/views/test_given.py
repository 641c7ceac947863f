# SPDX-License-Identifier: GPL-2.0-or-later
"""What a command line says of a rule, in the words of `add` and of `set`."""

import pytest
from worlds import NOW

from qubes_fwd_qrexec.admin.views import given, parser
from qubes_fwd_qrexec.common.errors import UsageError

CHANGES = [
    ("web comment=x", "web", ["option 'comment': comment=x"]),
    ("comment=x", None, ["option 'comment': comment=x"]),
    ("--comment x", None, ["--comment: comment=x"]),
    ("--via sys-net web", "web", ["--via: via=sys-net"]),
    ("web --expire 1h comment=x", "web", ["option 'comment': comment=x", f"--expire: expire={NOW + 3600}"]),
    ("web --from 10.0.0.0/8 --from fd00::/8", "web", ["--from: srchosts=10.0.0.0/8,fd00::/8"]),
    ("srchosts+=a srchosts-=b", None, ["option 'srchosts+': srchosts+=a", "option 'srchosts-': srchosts-=b"]),
    ("expire=+=1h30m", None, ["option 'expire+': expire+=5400"]),
    ("expire+=1h", None, ["option 'expire+': expire+=3600"]),
    ("--extend 60", None, ["--extend: expire+=60"]),
    ("expire=never", None, ["option 'expire': expire="]),
    ("--expire never", None, ["--expire: expire="]),
    (
        "--internal --autostart --follow-netvm --bypass-tunnel --disabled",
        None,
        [
            "--internal: forwardtype=internal",
            "--autostart: autostart=yes",
            "--disabled: enabled=no",
            "--follow-netvm: follow-netvm=yes",
            "--bypass-tunnel: bypass-tunnel=yes",
        ],
    ),
    (
        "--listen ::1 --mode nft --proto udp --transport mux --proxy v2 --on-expire cut --limits rate:1",
        None,
        [
            "--mode: mode=nft",
            "--proto: proto=udp",
            "--listen: listen=::1",
            "--transport: transport=mux",
            "--proxy: proxy=v2",
            "--on-expire: on-expire=cut",
            "--limits: limits=rate:1",
        ],
    ),
]


@pytest.mark.parametrize(("words", "name", "options"), CHANGES)
def test_set_takes_the_options_of_add_and_those_of_a_rule(
    words: str, name: str | None, options: list[str]
) -> None:
    found, asked = given.changes(parser.parse(["set", "work", *words.split()]), NOW)
    assert (found, [f"{place}: {option}={text}" for option, text, place in asked]) == (name, options)


REFUSED = [
    (("via=a", "via=b"), "option 'via': given twice"),
    (("via=a", "--via", "b"), "--via: option 'via' says that already"),
    (("--via", "a", "--via", "b"), "--via: given twice"),
    (("--internal", "--internal"), "--internal: given twice"),
    (("srchosts=a", "srchosts+=b"), "option 'srchosts+': option 'srchosts' says that already"),
    (("srchosts+=a", "srchosts+=b"), "option 'srchosts+': given twice"),
    (("srchosts-=b", "--from", "a"), "--from: option 'srchosts-' says that already"),
    (("--expire", "1h", "--extend", "1h"), "--extend: --expire says that already"),
    (("expire=soon",), "option 'expire': 'soon' is not a time such as 8h"),
    (("--expire", "soon"), "--expire: 'soon' is not a time such as 8h"),
    (("--extend", "18:00"), "--extend: '18:00' is not a duration such as 1h30m"),
    (("expire=+=",), "option 'expire+': '' is not a duration"),
    (("--via", ""), "--via: it is empty"),
    (("--from", ""), "--from: it is empty"),
    (("web", "ssh", "via=a"), "'ssh': an option is written name=value"),
    (("via=a", "web"), "'web': an option is written name=value"),
]


@pytest.mark.parametrize(("words", "error"), REFUSED)
def test_what_is_given_twice_or_wrongly_is_named_as_it_was_typed(words: tuple[str, ...], error: str) -> None:
    with pytest.raises(UsageError) as wrong:
        given.changes(parser.parse(["set", "work", *words]), NOW)
    assert error in str(wrong.value)


def test_a_comment_may_be_emptied_by_either_form() -> None:
    for words in (["--comment", ""], ["comment="]):
        assert given.changes(parser.parse(["set", "work", *words]), NOW)[1][0][:2] == ("comment", "")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "--from is missing"),
        (("--from", "any", "--via", "a", "--via", "b"), "--via: given twice"),
        (("--from", "any", "--listen", ""), "--listen: it is empty"),
    ],
)
def test_add_hears_of_what_is_missing_twice_or_empty(words: tuple[str, ...], error: str) -> None:
    with pytest.raises(UsageError) as wrong:
        given.new_rule(parser.parse(["add", "work", "80", *words]), NOW)
    assert error in str(wrong.value)
