# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0 tells a target that it allows: what is printed is read, and anything else is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rule_strategies import qube_names

from qubes_fwd_qrexec.common.allowance import (
    ALLOWANCE_MAX_BYTES,
    ANSWER_MAX_BYTES,
    DRAIN_MAX_S,
    Allowance,
    Calls,
    Revoked,
)
from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.common.values import Proto, QubeName, TargetPorts

ports = st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(lambda p: TargetPorts(min(p), max(p)))
calls = st.builds(Calls, ports, qube_names, st.sampled_from(Proto.BOTH.each))
WEB = Calls(TargetPorts(8080, 8080), QubeName("sys-net"))
RANGE = Calls(TargetPorts(9000, 9010), QubeName("sys-net"))
DNS = Calls(TargetPorts(53, 53), QubeName("sys-net"), Proto.UDP)


@st.composite
def allowances(draw: st.DrawFn) -> Allowance:
    keeps = draw(st.frozensets(calls, max_size=20))
    drains = draw(st.dictionaries(calls, st.integers(1, DRAIN_MAX_S), max_size=20))
    drains = {c: seconds for c, seconds in drains.items() if c not in keeps}
    return Allowance(keeps=keeps, drains=drains, cuts_drains=draw(st.booleans()))


@given(allowances())
def test_what_is_printed_is_read(allowance: Allowance) -> None:
    assert Allowance.parse(str(allowance).encode("ascii")) == allowance


@given(st.binary(max_size=300) | st.text("version=1 drains=keepcutd\n019-x", max_size=80).map(str.encode))
def test_whatever_comes_is_an_allowance_or_an_error_of_one_line(untrusted: bytes) -> None:
    try:
        allowance = Allowance.parse(untrusted)
    except TextError as error:
        told = str(error)
    else:
        told = ""
        assert Allowance.parse(str(allowance).encode("ascii")) == allowance
    assert told.isascii()
    assert "\n" not in told


def test_it_is_spelled_so() -> None:
    allowance = Allowance(keeps=frozenset({WEB}), drains={RANGE: 3600})
    text = "version=1 drains=keep\nkeep 8080-8080 sys-net\ndrain 9000-9010 sys-net 3600\n"
    assert str(allowance) == text
    assert str(Allowance(cuts_drains=True)) == "version=1 drains=cut\n"
    assert Allowance.parse(text.encode()) == allowance


def test_calls_that_carry_udp_say_so_and_are_others_than_those_that_carry_tcp() -> None:
    tcp = DNS._replace(proto=Proto.TCP)
    allowance = Allowance(keeps=frozenset({DNS}), drains={tcp: 60})
    text = "version=1 drains=keep\nkeep udp 53-53 sys-net\ndrain 53-53 sys-net 60\n"
    assert str(allowance) == text
    assert Allowance.parse(text.encode()) == allowance
    text = "version=1 drains=keep\nkeep 53-53 sys-net\ndrain udp 53-53 sys-net 60\n"
    assert Allowance.parse(text.encode()) == Allowance(keeps=frozenset({tcp}), drains={DNS: 60})


HEAD = "version=1 drains=keep\n"
BAD = [
    "",
    "\n",
    "version=1\n",
    "version=1 drains=keep",
    "version=2 drains=keep\n",
    "version=1 drains=yes\n",
    "version=1  drains=keep\n",
    "version=1 drains=keep \n",
    "version=1 drains=keep\r\n",
    "keep 8080-8080 sys-net\n",
    f"{HEAD}keep 8080-8080 sys-net",
    f"{HEAD}keep 8080-8080 sys-net\n\n",
    f"{HEAD}{HEAD}",
    f"{HEAD}keep 8080 sys-net\n",
    f"{HEAD}keep 08080-8080 sys-net\n",
    f"{HEAD}keep 0-8080 sys-net\n",
    f"{HEAD}keep 8080-8080\n",
    f"{HEAD}keep 8080-8080 sys-net 5\n",
    f"{HEAD}keep 8080-8080 sys net\n",
    f"{HEAD}keep 8080-8080 @anyvm\n",
    f"{HEAD}keep 8080-8080 s\u00fcs-net\n",
    f"{HEAD} keep 8080-8080 sys-net\n",
    f"{HEAD}kept 8080-8080 sys-net\n",
    f"{HEAD}keep tcp 8080-8080 sys-net\n",
    f"{HEAD}keep both 8080-8080 sys-net\n",
    f"{HEAD}keep udp 8080 sys-net\n",
    f"{HEAD}keep udp  8080-8080 sys-net\n",
    f"{HEAD}keep udp udp 8080-8080 sys-net\n",
    f"{HEAD}keep 8080-8080 sys-net udp\n",
    f"{HEAD}udp keep 8080-8080 sys-net\n",
    f"{HEAD}keep udp 53-53 sys-net\ndrain udp 53-53 sys-net 5\n",
    f"{HEAD}drain 8080-8080 sys-net\n",
    f"{HEAD}drain 8080-8080 sys-net 0\n",
    f"{HEAD}drain 8080-8080 sys-net -1\n",
    f"{HEAD}drain 8080-8080 sys-net 010\n",
    f"{HEAD}drain 8080-8080 sys-net {DRAIN_MAX_S + 1}\n",
    f"{HEAD}keep 8080-8080 sys-net\nkeep 8080-8080 sys-net\n",
    f"{HEAD}keep 8080-8080 sys-net\ndrain 8080-8080 sys-net 5\n",
    f"{HEAD}drain 8080-8080 sys-net 5\ndrain 8080-8080 sys-net 6\n",
]


@pytest.mark.parametrize("text", BAD)
def test_anything_else_is_refused_as_a_whole(text: str) -> None:
    with pytest.raises(TextError):
        Allowance.parse(text.encode())


def test_another_version_is_named() -> None:
    with pytest.raises(TextError, match=r"version=2 drains=keep.*is not version=1.*update the older one"):
        Allowance.parse(b"version=2 drains=keep\n")


def test_it_has_a_bound_that_both_sides_keep() -> None:
    few = [Calls(TargetPorts(n, n), QubeName("a" * 31)) for n in range(10000, 11000)]
    many = [Calls(TargetPorts(n, n), QubeName("a" * 31)) for n in range(10000, 12000)]
    assert len(str(Allowance(keeps=frozenset(few)))) <= ALLOWANCE_MAX_BYTES
    with pytest.raises(TextError, match="at most 65536 bytes"):
        Allowance(keeps=frozenset(many))
    with pytest.raises(TextError, match="at most 65536 bytes"):
        Allowance.parse(b"version=1 drains=keep\n" + b"x" * ALLOWANCE_MAX_BYTES)


@pytest.mark.parametrize("seconds", [0, -1, DRAIN_MAX_S + 1])
def test_a_drain_takes_its_time_and_no_more_than_a_day(seconds: int) -> None:
    with pytest.raises(TextError, match="seconds of a drain"):
        Allowance(drains={WEB: seconds})


def test_what_is_kept_does_not_drain() -> None:
    with pytest.raises(TextError, match="either kept or drained"):
        Allowance(keeps=frozenset({WEB}), drains={WEB: 5})


@given(st.builds(Revoked, st.integers(0, 10**6), st.integers(0, 10**6)))
def test_an_answer_that_is_printed_is_read(answer: Revoked) -> None:
    assert Revoked.parse(f"{answer}\n".encode()) == answer
    assert Revoked.parse(str(answer).encode()) == answer


BAD_ANSWERS = [
    b"",
    b"1\n",
    b"version=2 ended=1 draining=0\n",
    b"version=1 ended=-1 draining=0\n",
    b"version=1 ended=1\n",
    b"version=1 ended=1 draining=0\nmore",
    b"version=1 ended=\xd9\xa1 draining=0\n",
    b"version=1 ended=1 draining=0 " + b" " * ANSWER_MAX_BYTES,
    b"version=1 ended=" + b"1" * 40 + b" draining=0\n",
]


@pytest.mark.parametrize("untrusted", BAD_ANSWERS)
def test_any_other_answer_is_refused(untrusted: bytes) -> None:
    with pytest.raises(TextError):
        Revoked.parse(untrusted)
