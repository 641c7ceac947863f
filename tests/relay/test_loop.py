# SPDX-License-Identifier: GPL-2.0-or-later
import os
import socket
import time
from collections.abc import Iterator
from functools import partial

import pytest
from helpers import BOUND_S, nobody, unix_pair

from qubes_fwd_qrexec.relay.loop import GONE, READ, WRITE, Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = unix_pair()
    with one, other:
        yield one, other


Pair = tuple[socket.socket, socket.socket]


def test_a_handler_gets_only_the_events_that_it_watches_for(loop: Loop, pair: Pair) -> None:
    one, other = pair
    heard: list[int] = []
    loop.watch(one.fileno(), READ, heard.append, nobody)
    loop.run_once(0)
    assert heard == []
    other.send(b"x")
    loop.run_once(0)
    assert heard == [READ]
    loop.change(one.fileno(), WRITE)
    loop.run_once(0)
    assert heard == [READ, WRITE]
    loop.change(one.fileno(), 0)
    loop.run_once(0)
    assert heard == [READ, WRITE]
    other.close()
    loop.run_once(0)
    assert heard[2] & GONE
    loop.unwatch(one.fileno())
    loop.run_once(0)
    assert len(heard) == 3


def test_a_handler_that_is_taken_back_in_the_same_turn_is_not_called(loop: Loop, pair: Pair) -> None:
    heard: list[int] = []

    def take_the_other_back(fd: int, _events: int) -> None:
        heard.append(fd)
        loop.unwatch(pair[0].fileno() if fd == pair[1].fileno() else pair[1].fileno())

    for sock in pair:
        loop.watch(sock.fileno(), WRITE, partial(take_the_other_back, sock.fileno()), nobody)
    loop.run_once(0)
    assert len(heard) == 1


def test_an_event_of_a_closed_descriptor_does_not_reach_the_next_with_its_number(
    loop: Loop, pair: Pair
) -> None:
    """The number is free from the close on, and the kernel's news of this turn were fetched before."""
    third, fourth = unix_pair()
    told: list[str] = []
    was_watched = {sock.fileno() for sock in pair}

    def replace(other: socket.socket, _events: int) -> None:
        told.append("an old one")
        fd = other.fileno()
        was_watched.discard(fd)
        loop.unwatch(fd)
        os.dup2(third.fileno(), fd)  # closes what was there, whose news of this turn wait
        loop.watch(fd, READ, lambda _: told.append("the new one"), nobody)

    with third, fourth:
        for sock, other in (pair, pair[::-1]):
            loop.watch(sock.fileno(), WRITE, partial(replace, other), nobody)
        loop.run_once(0)
        assert told == ["an old one"]
        (survivor,) = (sock for sock in pair if sock.fileno() in was_watched)
        loop.unwatch(survivor.fileno())
        fourth.send(b"x")
        loop.run_once(0)
        assert told == ["an old one", "the new one"]


def test_what_is_left_for_the_end_of_a_turn_comes_after_every_handler(loop: Loop, pair: Pair) -> None:
    order: list[str] = []

    def handle(_events: int) -> None:
        loop.soon(lambda: order.append("soon"), nobody)
        order.append("handler")

    for sock in pair:
        loop.watch(sock.fileno(), WRITE, handle, nobody)
    loop.run_once(0)
    assert order == ["handler", "handler", "soon", "soon"]


def test_what_is_left_by_nobodys_handler_waits_for_no_news(loop: Loop) -> None:
    done: list[bool] = []
    loop.soon(lambda: loop.soon(lambda: done.append(True), nobody), nobody)
    began = time.monotonic()
    loop.run_once(BOUND_S)
    assert done
    assert time.monotonic() - began < BOUND_S


def test_timers_come_in_their_order_and_not_too_early(loop: Loop) -> None:
    order: list[int] = []
    began = time.monotonic()
    for number in (3, 1, 2):
        loop.after(number / 100, lambda number=number: order.append(number), nobody)  # type: ignore[misc]
    while len(order) < 3:
        assert time.monotonic() - began < BOUND_S
        loop.run_once(BOUND_S)
    assert order == [1, 2, 3]
    assert time.monotonic() - began >= 0.03


def test_a_cancelled_timer_is_not_called_and_holds_nothing(loop: Loop) -> None:
    called: list[bool] = []
    timer = loop.after(0, lambda: called.append(True), nobody)
    loop.after(0, lambda: None, nobody)
    timer.cancel()
    assert (timer.callback, timer.end) == (None, None)
    loop.run_once(0.1)
    assert not called


def test_a_timer_of_a_timer_waits_for_its_own_time(loop: Loop) -> None:
    called: list[bool] = []
    loop.after(0, lambda: called.append(bool(loop.after(60, lambda: called.append(False), nobody))), nobody)
    loop.run_once(0.1)
    loop.run_once(0)
    assert called == [True]


def test_what_is_wanted_at_once_comes_in_the_next_turn(loop: Loop, pair: Pair) -> None:
    """However long that takes, so that whoever goes on and on leaves everybody a turn."""
    called: list[str] = []

    def again(name: str) -> None:
        called.append(name)
        loop.after(0.0, lambda: again("timer"), nobody)

    loop.watch(pair[0].fileno(), READ, lambda _: again("handler"), nobody)
    pair[1].send(b"x")
    loop.run_once(0)
    assert called == ["handler"]
    loop.unwatch(pair[0].fileno())
    for turns in range(2, 5):
        loop.run_once(0)
        assert called == ["handler"] + ["timer"] * (turns - 1)


def test_a_timer_shortens_the_wait_and_the_callers_bound_does_too(loop: Loop) -> None:
    began = time.monotonic()
    loop.after(BOUND_S, lambda: None, nobody)
    loop.run_once(0.01)
    loop.after(0.01, lambda: None, nobody)
    loop.run_once()
    loop.run_once(0)
    assert time.monotonic() - began < BOUND_S


# Bugs


def fail(_events: int = 0) -> None:
    raise ZeroDivisionError("a bug")


@pytest.mark.usefixtures("bugs_are_wanted")
@pytest.mark.parametrize("what", ["handler", "timer", "soon"])
def test_a_bug_ends_what_it_belongs_to_and_nothing_else(
    loop: Loop, pair: Pair, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[str] = []
    heard: list[int] = []
    one, other = pair

    def end() -> None:
        ended.append(what)
        if what == "handler":
            loop.unwatch(one.fileno())

    for _ in range(2):
        match what:
            case "handler":
                loop.watch(one.fileno(), WRITE, fail, end)
            case "timer":
                loop.after(0, fail, end)
            case "soon":
                loop.soon(fail, end)
        loop.watch(other.fileno(), WRITE, heard.append, nobody)
        loop.run_once(0)
        loop.run_once(0)
        loop.unwatch(other.fileno())
    assert ended == [what] * 2
    assert heard
    assert loop.bugs.count == 2
    (record,) = caplog.records  # logged once, with its trace
    assert record.exc_info is not None


@pytest.mark.usefixtures("bugs_are_wanted")
def test_a_bug_in_ending_it_is_another_one(loop: Loop) -> None:
    done: list[bool] = []
    loop.soon(fail, fail)
    loop.soon(lambda: done.append(True), nobody)
    loop.run_once(0)
    assert done
    assert loop.bugs.count == 2
