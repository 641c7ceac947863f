# SPDX-License-Identifier: GPL-2.0-or-later
from ipaddress import IPv4Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_fwd_qrexec.limits import PER_SOURCE, PROCESS_MAX, RATE, Account, Process, Refusal, process_max
from qubes_fwd_qrexec.rules import NO_LIMITS, Limits
from qubes_fwd_qrexec.values import IPAddress

ONE, OTHER = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def account(text: str = "", process: Process | None = None, clock: Clock | None = None) -> Account:
    limits = Limits.parse(text) if text else NO_LIMITS
    return Account(limits, process or Process(), clock or Clock())


def numbered(number: int) -> IPAddress:
    return ip_address(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")


def test_one_more_than_the_rule_takes_is_refused_until_one_leaves() -> None:
    counting = account("connections:2")
    assert [counting.admit(numbered(n)) for n in range(3)] == [None, None, Refusal.CONNECTIONS]
    counting.leave(numbered(0))
    assert counting.admit(numbered(7)) is None
    assert counting.connections == 2


def test_one_more_than_a_source_may_have_is_refused_and_others_are_unharmed() -> None:
    counting = account("per-source:2")
    assert [counting.admit(ONE) for _ in range(3)] == [None, None, Refusal.PER_SOURCE]
    assert counting.admit(OTHER) is None
    counting.leave(ONE)
    assert counting.admit(ONE) is None


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("0.0.0.1", "0:0:0:1::", False),
    ],
)
def test_ipv6_counts_by_its_64_bit_network_and_mapped_ipv4_as_ipv4(
    one: str, other: str, is_same: bool
) -> None:
    counting = account("per-source:1")
    assert counting.admit(ip_address(one)) is None
    assert counting.admit(ip_address(other)) is (Refusal.PER_SOURCE if is_same else None)
    counting.leave(ip_address(other if is_same else one))
    assert counting.admit(ip_address(one)) is None


def test_a_rate_lets_in_a_seconds_worth_at_once_and_then_as_time_goes() -> None:
    clock = Clock()
    counting = account("rate:4", clock=clock)
    assert [counting.admit(ONE) for _ in range(5)] == [None] * 4 + [Refusal.RATE]
    clock.now += 0.25
    assert [counting.admit(ONE) for _ in range(2)] == [None, Refusal.RATE]
    clock.now += 1000
    assert [counting.admit(ONE) for _ in range(5)] == [None] * 4 + [Refusal.RATE]


def test_who_is_refused_for_another_reason_uses_no_rate() -> None:
    counting = account("rate:2,per-source:1")
    assert counting.admit(ONE) is None
    for _ in range(10):
        assert counting.admit(ONE) is Refusal.PER_SOURCE
    assert counting.admit(OTHER) is None


def test_the_process_counts_all_its_forwards() -> None:
    process = Process(3)
    first, second = account("connections:3", process), account("connections:3", process)
    assert [first.admit(ONE), first.admit(ONE), second.admit(ONE)] == [None] * 3
    assert second.admit(OTHER) is Refusal.PROCESS
    first.leave(ONE)
    assert second.admit(OTHER) is None
    assert process.connections == 3


def test_a_rule_that_says_nothing_leaves_a_quarter_of_the_process_to_others() -> None:
    process = Process(8)
    greedy, other = account("", process), account("", process)
    assert [greedy.admit(ONE) for _ in range(7)] == [None] * 6 + [Refusal.CONNECTIONS]
    assert [other.admit(ONE) for _ in range(3)] == [None, None, Refusal.PROCESS]


def test_the_defaults_hold_what_was_measured_and_bound_each_source_and_second() -> None:
    assert Process().rule_max == 12_288
    clock = Clock()
    counting = account(clock=clock)
    found = [counting.admit(ONE) for _ in range(PER_SOURCE + 1)]
    assert found == [None] * PER_SOURCE + [Refusal.PER_SOURCE]
    found = [counting.admit(numbered(n)) for n in range(RATE - PER_SOURCE + 1)]
    assert found == [None] * (RATE - PER_SOURCE) + [Refusal.RATE]


def test_new_limits_hold_for_newcomers_and_give_no_second_burst() -> None:
    counting = account("rate:2")
    assert [counting.admit(numbered(n)) for n in range(2)] == [None, None]
    counting.change(Limits(connections=1, rate=2))
    assert counting.connections == 2
    assert counting.admit(ONE) is Refusal.CONNECTIONS
    counting.change(Limits(rate=2))
    assert counting.admit(ONE) is Refusal.RATE
    counting.change(Limits(rate=3))
    assert counting.admit(ONE) is None


def test_ten_thousand_cycles_leave_nothing() -> None:
    clock, process = Clock(), Process()
    counting = account("", process, clock)
    for number in range(10_000):
        clock.now += 0.001
        assert counting.admit(numbered(number % 700)) is None
        if number >= 100:
            counting.leave(numbered((number - 100) % 700))
    assert (counting.connections, counting.sources) == (100, 100)
    for number in range(9_900, 10_000):
        counting.leave(numbered(number % 700))
    assert (counting.connections, counting.sources, process.connections) == (0, 0, 0)


@given(st.lists(st.integers(-6, 6).filter(bool), max_size=60))
def test_whatever_comes_and_goes_no_limit_is_passed_and_nothing_is_refused_below_all(
    moves: list[int],
) -> None:
    process = Process(5)
    counting = account("connections:4,per-source:2", process)
    held: list[int] = []
    for move in moves:
        source = abs(move)
        if move > 0:
            refusal = counting.admit(numbered(source))
            assert (refusal is None) is (held.count(source) < 2 and len(held) < 4)
            held += [source] * (refusal is None)
        elif source in held:
            held.remove(source)
            counting.leave(numbered(source))
        assert counting.connections == process.connections == len(held)
        assert counting.sources == len(set(held))


@pytest.mark.parametrize(("limits", "number"), [("", 12_288), ("connections:7", 7)])
def test_the_words_say_which_limit_and_how_high_it_is(limits: str, number: int) -> None:
    counting = account(limits)
    assert f"there are {number} connections, the limit connections" in counting.words(Refusal.CONNECTIONS)
    assert len({counting.words(refusal) for refusal in Refusal}) == len(Refusal)
    assert f"{PER_SOURCE} connections, the limit per-source" in counting.words(Refusal.PER_SOURCE)
    assert f"more than {RATE} new" in counting.words(Refusal.RATE)
    assert str(PROCESS_MAX) in counting.words(Refusal.PROCESS)


@pytest.mark.parametrize(
    ("descriptors", "connections"), [(-1, PROCESS_MAX), (1 << 20, PROCESS_MAX), (64, 48), (1, 1)]
)
def test_a_process_with_few_files_takes_fewer(descriptors: int, connections: int) -> None:
    assert process_max(descriptors) == connections
    assert Process(1).rule_max == 1
