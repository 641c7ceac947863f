# SPDX-License-Identifier: GPL-2.0-or-later
"""A look for whoever asks: never one that began before, few for many, and waited for within a bound."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from qubes_fwd_qrexec.exposed.freshlook import BOUND_S, GAP_S, FreshLook
from qubes_fwd_qrexec.system.configsource import FileSource


class Source(FileSource):
    """Knows what is new when it is told to."""

    def __init__(self) -> None:
        super().__init__(Path("/nonexistent"))
        self.asked: list[Callable[[], None]] = []

    def refresh(self, done: Callable[[], None]) -> None:
        self.asked.append(done)


class Listener:
    def __init__(self) -> None:
        self.source = Source()
        self.looks = 0
        self.cutting = 0
        self.answered = 0
        self._fresh = FreshLook(self.source, self._look, lambda: self.cutting > 0)

    def _look(self) -> None:
        self.looks += 1

    async def ask(self) -> None:
        await self._fresh()
        self.answered += 1

    async def goes_on(self) -> tuple[int, int, int]:
        """Reads that were asked for, looks, and answers, once nothing moves."""
        await wait_all_tasks_blocked()
        return len(self.source.asked), self.looks, self.answered


@pytest.fixture
def listener() -> Listener:
    return Listener()


async def test_who_asks_during_a_look_waits_for_the_next_with_all_others(
    listener: Listener, mock_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.ask)
        assert await listener.goes_on() == (1, 0, 0)
        for _ in range(20):
            nursery.start_soon(listener.ask)
        assert await listener.goes_on() == (1, 0, 0)
        listener.source.asked[0]()
        assert await listener.goes_on() == (1, 1, 1)
        mock_clock.jump(GAP_S)
        assert await listener.goes_on() == (2, 1, 1)
        listener.source.asked[1]()
        assert await listener.goes_on() == (2, 2, 21)


async def test_a_source_that_does_not_answer_is_waited_for_so_long(
    listener: Listener, autojump_clock: MockClock
) -> None:
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(listener.ask)
    assert trio.current_time() - begun == BOUND_S
    assert (listener.looks, listener.answered) == (0, 3)
    listener.source.asked[0]()  # too late, and nobody minds


async def test_the_answer_waits_for_what_was_cut(listener: Listener, mock_clock: MockClock) -> None:
    listener.cutting = 2
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.ask)
        await wait_all_tasks_blocked()
        listener.source.asked[0]()
        for left in (1, 0):
            assert await listener.goes_on() == (1, 1, 0)
            listener.cutting = left
            mock_clock.jump(BOUND_S / 10)
        assert await listener.goes_on() == (1, 1, 1)


async def test_what_was_cut_and_does_not_end_is_waited_for_so_long(
    listener: Listener, autojump_clock: MockClock
) -> None:
    listener.cutting = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.ask)
        await wait_all_tasks_blocked()
        listener.source.asked[0]()
    assert (listener.looks, listener.answered) == (1, 1)
