# SPDX-License-Identifier: GPL-2.0-or-later
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from visitors import ONE, OTHER, PLENTY, Clock, Visitor, account, enter, let_in, numbered

from qubes_fwd_qrexec.common.rules import Limits
from qubes_fwd_qrexec.exposed.limits import (
    CLIENTS_PER_NETWORK,
    MEMORY_EACH_BYTES,
    PER_SOURCE,
    PROCESS_MAX,
    RATE,
    NotAdmitted,
    Process,
    budget,
    process_max,
)
from qubes_fwd_qrexec.relay.budget import FLOOR_BYTES, LENT_BYTES
from qubes_fwd_qrexec.relay.socketbuffers import HELD_BYTES


def test_one_more_than_the_rule_takes_is_refused_until_one_leaves() -> None:
    counting = account("connections:2")
    first, _ = let_in(counting, numbered(0), numbered(1))
    assert enter(counting, numbered(1), numbered(0)) == [NotAdmitted.CONNECTIONS] * 2
    counting.leave(first)
    let_in(counting, numbered(7))
    assert counting.connections == 2


def test_one_more_than_a_client_may_have_is_refused_and_others_are_unharmed() -> None:
    counting = account("per-source:2")
    first, _ = let_in(counting, ONE, ONE)
    assert enter(counting, ONE) == [NotAdmitted.PER_SOURCE]
    let_in(counting, OTHER)
    counting.leave(first)
    let_in(counting, ONE)


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", False),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("fe80::1", "fe80::2", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("0.0.0.1", "::1", False),
        ("2001:db8::1", "2001:db8:0:0::1", True),
    ],
)
def test_each_address_is_a_client(one: str, other: str, is_same: bool) -> None:
    counting = account("per-source:1")
    let_in(counting, ip_address(one))
    assert enter(counting, ip_address(other)) == [NotAdmitted.PER_SOURCE if is_same else None]


def test_the_addresses_of_one_ipv6_network_have_a_bound_together() -> None:
    counting = account("per-source:2")
    addresses = [ip_address(f"2001:db8::{n:x}") for n in range(1, 2 * CLIENTS_PER_NETWORK + 2)]
    *within, beyond = addresses
    visitors = let_in(counting, *within)
    assert enter(counting, beyond) == [NotAdmitted.PER_SOURCE]
    let_in(counting, ip_address("2001:db8:0:1::1"), ONE)
    counting.leave(visitors[0])
    let_in(counting, beyond)


def test_a_rate_lets_in_a_seconds_worth_at_once_and_then_as_time_goes() -> None:
    clock = Clock()
    counting = account("rate:4", clock=clock)
    assert enter(counting, *map(numbered, range(5))) == [None] * 4 + [NotAdmitted.RATE]
    clock.now += 0.25
    assert enter(counting, numbered(8), numbered(9)) == [None, NotAdmitted.RATE]
    clock.now += 1000
    assert enter(counting, *map(numbered, range(5))) == [None] * 4 + [NotAdmitted.RATE]


def test_one_client_has_half_of_a_rate_at_once_and_leaves_the_rest_to_others() -> None:
    clock = Clock()
    counting = account("rate:4", clock=clock)
    assert enter(counting, ONE, ONE, ONE, OTHER, OTHER) == [None, None, NotAdmitted.RATE, None, None]
    clock.now += 1
    assert enter(counting, *[ONE] * 4) == [None, None, NotAdmitted.RATE, NotAdmitted.RATE]
    for _ in range(8):  # all of the rate, while nobody else wants any of it
        clock.now += 0.25
        assert enter(counting, ONE) == [None]
    assert enter(counting, OTHER, OTHER) == [None, None]


def test_clients_of_the_past_are_forgotten() -> None:
    clock = Clock()
    counting = account("rate:10", clock=clock)
    for number in range(1000):
        clock.now += 1
        (visitor,) = let_in(counting, numbered(number))
        counting.leave(visitor)
        assert counting.clients_remembered <= 21


def test_a_client_refused_for_another_reason_uses_no_rate() -> None:
    counting = account("rate:2,per-source:1")
    let_in(counting, ONE)
    assert enter(counting, *[ONE] * 10) == [NotAdmitted.PER_SOURCE] * 10
    let_in(counting, OTHER)


def test_the_process_counts_all_its_forwards() -> None:
    process = Process(3)
    first, second = account("connections:3", process), account("connections:3", process)
    visitor, _ = let_in(first, ONE, ONE)
    let_in(second, OTHER)
    assert enter(first, ONE) == [NotAdmitted.PROCESS]
    first.leave(visitor)
    let_in(second, OTHER)
    assert process.connections == 3


def test_a_rule_that_says_nothing_leaves_a_quarter_of_the_process_to_others() -> None:
    process = Process(8)
    greedy, other = account("", process), account("", process)
    assert enter(greedy, *[ONE] * 7) == [None] * 6 + [NotAdmitted.CONNECTIONS]
    let_in(other, ONE, ONE)
    assert process.connections == 8


def test_an_ipv4_address_is_none_of_the_networks_of_ipv6() -> None:
    """However they are counted: this network's number would be that address."""
    counting = account("per-source:1")
    let_in(counting, ONE, *(ip_address((int(ONE) << 64) + host) for host in range(1, 9)))
    assert enter(counting, ip_address((int(ONE) << 64) + 9), OTHER) == [NotAdmitted.PER_SOURCE, None]
    assert (counting.crowd.held_in(ONE), counting.crowd.held_by(ONE)) == (1, 1)


def test_the_defaults_hold_what_was_measured_and_bound_each_client_and_second() -> None:
    assert Process(memory=lambda: PLENTY).rule_max == 49_152
    counting = account()
    assert enter(counting, *[ONE] * (PER_SOURCE + 1)) == [None] * PER_SOURCE + [NotAdmitted.PER_SOURCE]
    found = enter(counting, *map(numbered, range(RATE - PER_SOURCE + 1)))
    assert found == [None] * (RATE - PER_SOURCE) + [NotAdmitted.RATE]


def test_new_limits_hold_for_newcomers_and_give_no_second_burst() -> None:
    counting = account("rate:2")
    let_in(counting, numbered(0), numbered(1))
    counting.change(Limits(connections=1, rate=2))
    assert counting.connections == 2
    assert enter(counting, numbered(0)) == [NotAdmitted.CONNECTIONS]
    counting.change(Limits(rate=2))
    assert enter(counting, ONE) == [NotAdmitted.RATE]
    counting.change(Limits(rate=3))
    let_in(counting, ONE)


def test_ten_thousand_cycles_leave_nothing() -> None:
    clock, process = Clock(), Process(memory=lambda: PLENTY)
    counting = account("", process, clock)
    held: list[Visitor] = []
    for number in range(10_000):
        clock.now += 0.001
        held += let_in(counting, numbered(number % 700))
        if number >= 100:
            counting.leave(held.pop(0))
    assert (counting.connections, counting.clients) == (100, 100)
    for visitor in held:
        counting.leave(visitor)
    assert (counting.connections, counting.clients, process.connections) == (0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(-6, 6).filter(bool)), max_size=60))
def test_no_limit_is_passed_and_only_clients_that_hold_more_make_room(
    moves: list[tuple[int, int]],
) -> None:
    process = Process(5)
    accounts = [account("connections:4,per-source:2", process) for _ in range(2)]
    held: list[list[Visitor]] = [[], []]
    for which, move in moves:
        counting, client = accounts[which], numbered(abs(move))
        if move > 0:
            visitor = Visitor(client)
            numbers = [len(own) for own in held]
            own = sum(other.client == client for other in held[which])
            refusal = counting.admit(visitor)
            held[which] += [visitor] * (refusal is None)
            assert refusal is None or own == 2 or sum(numbers) == 5 or numbers[which] == 4
            for index, visitors in enumerate(held):
                gone = [other for other in visitors if other.has_made_room]
                assert len(gone) <= 1
                for other in gone:
                    visitors.remove(other)
                    assert refusal is None
                    if index == which:
                        assert sum(one.client == other.client for one in visitors) >= own
                    else:
                        assert numbers[index] > numbers[which]
        else:
            for visitor in [one for one in held[which] if one.client == client][:1]:
                held[which].remove(visitor)
                counting.leave(visitor)
                counting.leave(visitor)
        assert [one.connections for one in accounts] == [len(own) for own in held]
        assert process.connections == sum(map(len, held)) <= 5
        assert all(len(own) <= 4 for own in held)
        for counting, own in zip(accounts, held, strict=True):
            assert counting.clients == len({visitor.client for visitor in own})
            assert set(counting.crowd) == set(own)


@pytest.mark.parametrize(("limits", "number"), [("", 49_152), ("connections:7", 7)])
def test_the_words_say_which_limit_and_how_high_it_is(limits: str, number: int) -> None:
    counting = account(limits)
    assert f"there are {number} connections, the limit connections" in counting.words(NotAdmitted.CONNECTIONS)
    assert len({counting.words(refusal) for refusal in NotAdmitted}) == len(NotAdmitted)
    assert f"{PER_SOURCE} connections, the limit per-source" in counting.words(NotAdmitted.PER_SOURCE)
    assert f"more than {RATE} new" in counting.words(NotAdmitted.RATE)
    assert str(PROCESS_MAX) in counting.words(NotAdmitted.PROCESS)


@pytest.mark.parametrize(
    ("descriptors", "connections"), [(-1, PROCESS_MAX), (1 << 20, PROCESS_MAX), (64, 48), (1, 1)]
)
def test_a_process_with_few_files_takes_fewer(descriptors: int, connections: int) -> None:
    assert process_max(descriptors) == connections
    assert Process(1).rule_max == 1


def test_a_qube_holds_one_for_each_32_kib_that_it_has_now_and_not_more_than_it_may() -> None:
    memory, clock = 400 << 20, Clock()
    process = Process(15_000, clock, memory=lambda: memory)
    assert (process.connections_max, process.rule_max) == (12_800, 9_600)
    memory *= 2
    assert process.connections_max == 12_800, "it looks once a second"
    clock.now += 1
    assert (process.connections_max, process.rule_max) == (15_000, 11_250), "dom0 has given it more"
    memory = 1000
    clock.now += 1
    assert process.connections_max == 1


def test_a_newcomer_is_one_too_many_where_the_memory_is_used_up() -> None:
    process = Process(memory=lambda: 3 * MEMORY_EACH_BYTES)
    counting = account("connections:100", process)
    assert enter(counting, *[ONE] * 4) == [None] * 3 + [NotAdmitted.PROCESS]


@pytest.mark.parametrize(("memory", "held_max"), [(300 << 20, 75 << 20), (1 << 40, HELD_BYTES)])
def test_the_bytes_of_all_that_a_listener_may_hold_have_a_bound(memory: int, held_max: int) -> None:
    of_all = budget(memory)
    assert of_all.streams_max == PROCESS_MAX
    assert of_all.total == LENT_BYTES + PROCESS_MAX * FLOOR_BYTES == 160 << 20
    assert of_all.sockets.held_max == held_max
