# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is served next when calls are few."""

from collections import Counter
from collections.abc import Callable
from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from qubes_fwd_qrexec.exposed.callqueue import CallQueue, Key, Kind, Wanted
from qubes_fwd_qrexec.exposed.crowd import client_key


def single(rule: str, source: str = "a") -> Wanted:
    return Wanted(Kind.SINGLE, "work", "s+1", (rule, source))


def anybody(_: Wanted) -> bool:
    return True


def take(queue: "CallQueue[Wanted]", may_begin: Callable[[Wanted], bool]) -> Wanted | None:
    found = queue.first(may_begin)
    if found is not None:
        queue.begin(found)
    return found


def taken(queue: "CallQueue[Wanted]", count: int) -> list[Key]:
    found = [take(queue, anybody) for _ in range(count)]
    return [wanted.key for wanted in found if wanted is not None]


def queue_of(*waiting: Wanted, waiting_max: int = 1024) -> "CallQueue[Wanted]":
    queue: CallQueue[Wanted] = CallQueue(waiting_max)
    for wanted in waiting:
        queue.add(wanted)
    return queue


def test_renewals_come_first_and_then_mux_calls() -> None:
    waiting = single("web"), Wanted(Kind.MUX, "work", "m"), Wanted(Kind.RENEWAL, "work", "m")
    queue = queue_of(*waiting)
    assert list(queue) == list(reversed(waiting))
    assert [take(queue, anybody) for _ in range(4)] == [*reversed(waiting), None]


def test_the_next_one_is_for_the_rule_and_then_the_client_that_holds_fewest() -> None:
    crowd = [single("web", "a") for _ in range(5)]
    queue = queue_of(*crowd, single("web", "b"), single("ssh", "c"))
    assert taken(queue, 4) == [("web", "a"), ("ssh", "c"), ("web", "b"), ("web", "a")]
    assert queue.held(("web", "a")) == (3, 2)


def test_the_longest_waiting_is_first_among_equals_and_a_released_call_no_longer_counts() -> None:
    first, second = single("web"), single("web")
    queue = queue_of(first, second)
    assert take(queue, anybody) is first
    queue.release(first.key)
    assert queue.held(first.key) == (0, 0)
    assert take(queue, anybody) is second


def test_what_may_not_begin_holds_up_nobody_else() -> None:
    queue = queue_of(single("web"), single("ssh"))
    found = take(queue, lambda one: one.key[0] == "ssh")
    assert found is not None
    assert found.key == ("ssh", "a")
    assert len(queue) == 1


def test_if_too_many_wait_the_newest_of_the_largest_is_removed() -> None:
    crowd = [single("web", "a") for _ in range(3)]
    queue = queue_of(*crowd, waiting_max=3)
    other = single("web", "b")
    assert queue.add(other) is crowd[-1]
    assert queue.add(single("web", "a")) is not crowd[0]
    assert other in list(queue)
    assert queue.add(Wanted(Kind.MUX, "work", "m")) is None
    assert len(queue) == 4


def test_one_that_left_is_not_served_and_may_leave_twice() -> None:
    wanted = single("web")
    queue = queue_of(wanted)
    queue.remove(wanted)
    queue.remove(wanted)
    assert take(queue, anybody) is None


def test_one_ipv6_host_with_many_addresses_is_bounded() -> None:
    def key(address: str) -> Key:
        return ("web", *client_key(ip_address(address)))

    queue: CallQueue[Wanted] = CallQueue()
    for number in range(1, 5):
        queue.add(Wanted(Kind.SINGLE, "work", "s+1", key(f"2001:db8::{number}")))
    taken(queue, 4)
    assert queue.has_more_than_its_share(key("2001:db8::1"), key("2001:db8:0:1::1"))
    assert queue.has_more_than_its_share(key("2001:db8::1"), key("192.0.2.1"))
    assert not queue.has_more_than_its_share(key("2001:db8::1"), key("2001:db8::9"))


def test_only_more_than_a_share_makes_room() -> None:
    queue = queue_of(*[single("web", "a") for _ in range(2)], single("web", "b"), single("ssh", "c"))
    assert len(taken(queue, 4)) == 4
    assert not queue.has_more_than_its_share(("web", "a"), ("web", "b"))  # it would have 1 and 2 then
    assert queue.has_more_than_its_share(("web", "a"), ("web", "new"))
    assert queue.has_more_than_its_share(("web", "b"), ("ssh", "c"))  # its rule has 3
    assert not queue.has_more_than_its_share(("ssh", "c"), ("web", "new"))
    assert not queue.has_more_than_its_share(("web", "a"), ("web", "a"))
    assert queue.has_more_than_its_share(("web", "a"), ())  # a mux call
    assert not queue.has_more_than_its_share(("ssh", "c"), ())


@given(st.lists(st.tuples(st.sampled_from("rs"), st.sampled_from("abc")), max_size=30), st.integers(1, 12))
def test_no_rule_and_no_client_gets_two_more_than_another_that_waits(keys: list[Key], places: int) -> None:
    queue = queue_of(*[Wanted(Kind.SINGLE, "work", "s", key) for key in keys])
    served = Counter(taken(queue, places))
    left = Counter(wanted.key for wanted in queue)
    for key in left:
        for other in served:
            rules = [sum(n for k, n in served.items() if k[0] == one[0]) for one in (key, other)]
            assert rules[1] <= rules[0] + 1
            if key[0] == other[0]:
                assert served[other] <= served[key] + 1
