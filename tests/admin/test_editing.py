# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of a rule whose options change."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import NOW

from qubes_fwd_qrexec.admin.editing import edited
from qubes_fwd_qrexec.common.errors import RuleError
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.rules import ForwardRule


def changed(line: str, *words: str) -> str:
    """The line of a rule with the options of ``words``, without what all rules have."""
    rule = ForwardRule.parse(f"action=forward srcports=80 forwardtype=internal {line}")
    options = [Option(name, text, f"option {name!a}") for name, _, text in (w.rpartition("=") for w in words)]
    return str(edited(rule, options, NOW)).partition(" dstports=80-80 ")[2]


TWO = "srchosts=10.0.0.0/8,192.0.2.1/32"
CHANGED = [
    (TWO, ("comment=x",), f"{TWO} comment=x"),
    (f"{TWO} comment=old", ("comment=",), TWO),
    (TWO, ("srchosts+=fd00::/8,work",), f"{TWO},fd00::/8,work"),
    (TWO, ("srchosts+=10.0.0.0/8",), TWO),
    (TWO, ("srchosts+=any",), "srchosts=any"),
    (TWO, ("srchosts-=192.0.2.1",), "srchosts=10.0.0.0/8"),
    ("srchosts=10.0.0.0/8,work,@tag:x", ("srchosts-=@tag:x,10.0.0.0/8",), "srchosts=work"),
    (TWO, ("srchosts+=10.1.0.0/16", "srchosts-=10.0.0.0/8"), "srchosts=10.1.0.0/16,192.0.2.1/32"),
    (f"{TWO} expire={NOW + 60}", ("expire+=3600",), f"{TWO} expire={NOW + 3660}"),
    (f"{TWO} expire={NOW - 60}", ("expire+=3600",), f"{TWO} expire={NOW + 3600}"),
    (f"{TWO} expire={NOW + 60} ended=yes", ("expire+=3600",), f"{TWO} expire={NOW + 3600}"),
    (f"{TWO} expire={NOW - 60} ended=yes", (f"expire={NOW + 9}",), f"{TWO} expire={NOW + 9}"),
]


@pytest.mark.parametrize(("line", "words", "after"), CHANGED)
def test_options_are_set_emptied_and_edited(line: str, words: tuple[str, ...], after: str) -> None:
    assert changed(line, *words) == after


REFUSED = [
    (
        TWO,
        "srchosts-=10.0.0.0/16",
        "10.0.0.0/16 is not in the list; the rule lets in 10.0.0.0/8,192.0.2.1/32",
    ),
    (
        TWO,
        "srchosts-=192.0.2.1,10.0.0.0/8",
        "nobody would be left of 10.0.0.0/8,192.0.2.1/32; to close the forward, use 'disable'",
    ),
    (TWO, "srchosts-=10.0.0.1/8", "option 'srchosts-': '10.0.0.1/8' is not a network"),
    (TWO, "srchosts-=", "option 'srchosts-': '' is not"),
    ("srchosts=any", "srchosts-=10.0.0.0/8", "10.0.0.0/8 is not in the list; the rule lets in any"),
    (
        "srchosts=any",
        "srchosts+=10.0.0.0/8",
        "the rule already lets in everybody; to let in fewer, use srchosts=NET",
    ),
    ("srchosts=0.0.0.0/1", "srchosts+=128.0.0.0/1", "it lets in everybody by IPv4"),
    (TWO, "expire+=3600", "option 'expire+': the rule never expires; to set a time, use expire=TIME"),
    (f"{TWO} expire={NOW}", "expire+=999999999999", "option 'expire+': "),
    (TWO, "limits+=rate:5", "option 'limits+': unknown option"),
    (TWO, "srchost=10.0.0.0/8", "option 'srchost': unknown option; did you mean 'srchosts'?"),
    (TWO, "comment-=", "option 'comment-': unknown option"),
]


@pytest.mark.parametrize(("line", "word", "words"), REFUSED)
def test_what_makes_no_sense_is_refused_by_the_option_s_name(line: str, word: str, words: str) -> None:
    with pytest.raises(RuleError) as wrong:
        changed(line, word)
    assert words in str(wrong.value)


NETWORK = st.ip_addresses(network="10.0.0.0/8").map(lambda address: f"{address}/32")
LISTS = st.lists(NETWORK, min_size=1, max_size=5, unique=True)


@given(LISTS, LISTS)
def test_who_is_let_in_besides_and_shut_out_again_leaves_the_others(some: list[str], more: list[str]) -> None:
    rule = ForwardRule.parse(f"action=forward srcports=80 srchosts={','.join(some)}")
    new = ",".join(each for each in more if each not in some)
    wide = edited(rule, [Option("srchosts+", ",".join(more), "")], NOW)
    assert set(str(wide.sources).split(",")) == {*some, *more}
    assert (edited(wide, [Option("srchosts-", new, "")], NOW) if new else wide) == rule
