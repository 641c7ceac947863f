# SPDX-License-Identifier: GPL-2.0-or-later
"""Where all is full, the idlest connection of the largest holder makes room."""

import math
from ipaddress import ip_address

import pytest
from visitors import ONE, OTHER, PLENTY, Clock, Visitor, account, enter, let_in, numbered

from qubes_fwd_qrexec.common.rules import Limits
from qubes_fwd_qrexec.exposed.limits import (
    CLIENTS_PER_NETWORK,
    YIELDS,
    Account,
    NotAdmitted,
    Process,
)


def test_a_full_rule_makes_room_for_a_client_that_holds_less() -> None:
    counting = account("connections:3")
    oldest, busy, third = let_in(counting, ONE, ONE, ONE)
    oldest.moved_at, busy.moved_at, third.moved_at = 20.0, 30.0, 10.0
    let_in(counting, OTHER)
    assert [v.has_made_room for v in (oldest, busy, third)] == [False, False, True]
    assert counting.connections == 3
    assert counting.yielded == 1
    let_in(counting, numbered(1))
    assert oldest.has_made_room
    assert not busy.has_made_room
    assert enter(counting, OTHER) == [NotAdmitted.CONNECTIONS]  # nobody holds more than it does by now
    counting.leave(third)  # it ends a moment later, and is counted no more
    assert counting.connections == 3


def test_who_moves_keeps_its_connection_though_many_others_come_that_hold_as_much() -> None:
    counting = account("connections:10")
    (busy,) = let_in(counting, ONE)
    for number in range(40):
        busy.moved_at = number
        (other,) = let_in(counting, numbered(number))
        other.moved_at = number
    assert (busy.has_made_room, counting.connections, counting.yielded) == (False, 10, 31)


def test_a_network_of_many_addresses_yields_before_a_host_with_one() -> None:
    counting = account("connections:5")
    many = let_in(counting, *[ip_address(f"2001:db8::{n}") for n in range(1, 5)])
    (honest,) = let_in(counting, ONE)
    let_in(counting, OTHER)
    assert [v.has_made_room for v in many] == [True, False, False, False]
    assert not honest.has_made_room


def test_in_a_network_the_address_that_holds_most_yields_to_its_neighbours() -> None:
    counting = account("connections:3")
    greedy = let_in(counting, *[ip_address("fe80::1")] * 2)
    (neighbour,) = let_in(counting, ip_address("fe80::2"))
    let_in(counting, ip_address("fe80::3"))
    assert [v.has_made_room for v in greedy] == [True, False]
    assert not neighbour.has_made_room
    assert enter(counting, ip_address("fe80::1")) == [NotAdmitted.CONNECTIONS]


def test_the_rule_that_holds_most_yields_to_the_others() -> None:
    process = Process(4)
    greedy, other = account("connections:4", process), account("connections:4", process)
    held = let_in(greedy, *map(numbered, range(4)))
    let_in(other, ONE)
    assert [v.has_made_room for v in held] == [True, False, False, False]
    let_in(other, ONE)
    assert enter(other, ONE) == [NotAdmitted.PROCESS]
    assert (greedy.connections, other.connections, process.connections) == (2, 2, 4)


def test_a_client_that_has_all_it_may_gives_up_one_that_is_quiet_if_it_may_have_that() -> None:
    """Flows do, and connections do not."""
    clock = Clock()
    for quiet_s, expected in ((math.inf, NotAdmitted.PER_SOURCE), (5.0, None)):
        flows = Account(Limits.parse("per-source:3"), Process(memory=lambda: PLENTY), clock, quiet_s)
        own = [Visitor(ONE) for _ in range(3)]
        for visitor, quiet in zip(own, (1.0, 6.0, 0.0), strict=True):
            visitor.moved_at = clock.now - quiet
            assert flows.admit(visitor) is None
        fourth, fifth = Visitor(ONE), Visitor(ONE)
        fourth.moved_at = fifth.moved_at = clock.now
        assert flows.admit(fourth) is expected
        assert [visitor.has_made_room for visitor in own] == [False, expected is None, False]
        assert (flows.connections, flows.yielded) == (3, int(expected is None))
        assert flows.admit(fifth) is NotAdmitted.PER_SOURCE


@pytest.mark.parametrize(("connections", "of_process"), [(3, 9), (9, 3)])
def test_where_all_is_full_and_nobody_holds_more_a_client_gives_up_one_of_its_own_that_is_quiet(
    connections: int, of_process: int
) -> None:
    """Whoever claims many addresses has one flow for each, and would keep out all that have as many."""
    clock = Clock()
    process = Process(of_process)
    for quiet_s, is_let_in in ((math.inf, False), (5.0, True)):
        flows = Account(Limits.parse(f"connections:{connections}"), process, clock, quiet_s)
        held = [Visitor(client) for client in (ONE, OTHER, numbered(1))]
        for visitor in held:
            visitor.moved_at = clock.now - 6
            assert flows.admit(visitor) is None
        newcomer, next_one = Visitor(ONE), Visitor(ONE)
        newcomer.moved_at = next_one.moved_at = clock.now
        assert (flows.admit(newcomer) is None) is is_let_in
        assert [visitor.has_made_room for visitor in held] == [is_let_in, False, False]
        assert flows.admit(next_one) is not None  # what it has now is not quiet
        assert process.connections == 3
        for visitor in (*held, newcomer):
            flows.leave(visitor)


def test_the_quiet_one_is_found_among_many_that_are_busy() -> None:
    clock = Clock()
    flows = Account(Limits.parse("per-source:100"), Process(memory=lambda: PLENTY), clock, 5.0)
    many = [Visitor(ONE) for _ in range(100)]
    for visitor in many:
        visitor.moved_at = clock.now
        assert flows.admit(visitor) is None
    many[70].moved_at -= 6
    refused = 0
    newest = Visitor(ONE)
    newest.moved_at = clock.now
    while flows.admit(newest) is not None:
        refused += 1
    assert refused == 70 // 16
    assert [number for number, visitor in enumerate(many) if visitor.has_made_room] == [70]


def test_an_address_without_any_has_its_network_give_up_a_quiet_one() -> None:
    clock = Clock()
    flows = Account(Limits.parse("per-source:1"), Process(memory=lambda: PLENTY), clock, 5.0)
    hosts = [Visitor(ip_address(f"2001:db8::{number}")) for number in range(1, CLIENTS_PER_NETWORK + 1)]
    for visitor in hosts:
        visitor.moved_at = clock.now - 6
        assert flows.admit(visitor) is None
    assert flows.admit(Visitor(ip_address("2001:db8::99"))) is None
    assert sum(visitor.has_made_room for visitor in hosts) == 1
    assert flows.connections == CLIENTS_PER_NETWORK


def test_no_more_than_so_many_make_room_in_a_second() -> None:
    clock = Clock()
    process = Process(1000, clock)
    counting = account("connections:900", process, clock)
    let_in(counting, *[ONE] * 900)
    assert enter(counting, *map(numbered, range(YIELDS + 1))) == [None] * YIELDS + [NotAdmitted.CONNECTIONS]
    clock.now += 1
    let_in(counting, OTHER)
    assert (counting.connections, process.connections, counting.yielded) == (900, 900, YIELDS + 1)


def test_where_none_may_be_ended_the_idlest_is_not_looked_for() -> None:
    class Asked(Visitor):
        times = 0

        @property
        def moved_at(self) -> float:
            Asked.times += 1
            return 0.0

        @moved_at.setter
        def moved_at(self, _: float) -> None:
            """It is never idle."""

    clock = Clock()
    for process, limits in (
        (Process(1000, clock, 1), "connections:3"),
        (Process(3, clock, 1), "connections:9"),
    ):
        counting = account(limits, process, clock)
        assert [counting.admit(Asked(ONE)) for _ in range(3)] == [None] * 3
        assert counting.admit(Asked(OTHER)) is None
        asked = Asked.times
        assert asked >= 3
        full = NotAdmitted.CONNECTIONS if limits == "connections:3" else NotAdmitted.PROCESS
        assert counting.admit(Asked(numbered(0))) is full
        assert Asked.times == asked, "no more in this second"
