# SPDX-License-Identifier: GPL-2.0-or-later
"""The main thread of a program without GTK: what is delivered to it, and timers that a test lets pass."""

from collections.abc import Callable
from queue import Empty, SimpleQueue

from helpers import BOUND_S


class MainLoop:
    """``now`` is its clock, in seconds."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self._delivered: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._timers: list[tuple[float, Callable[[], None]]] = []

    def deliver(self, call: Callable[[], None]) -> None:
        self._delivered.put(call)

    def later(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        timer = (self.now + seconds, call)
        self._timers.append(timer)

        def cancel() -> None:
            if timer in self._timers:
                self._timers.remove(timer)

        return cancel

    def until(self, condition: Callable[[], object]) -> None:
        """Run what is delivered until the condition holds."""
        while not condition():
            try:
                self._delivered.get(timeout=BOUND_S)()
            except Empty:
                raise AssertionError(f"not so within {BOUND_S} s: {condition}") from None

    def take(self) -> None:
        """Run the next thing that is delivered."""
        self._delivered.get(timeout=BOUND_S)()

    def pass_time(self, seconds: float) -> None:
        """Let time pass; each timer runs at its own time."""
        end = self.now + seconds
        while due := min(
            (timer for timer in self._timers if timer[0] <= end), key=lambda t: t[0], default=None
        ):
            self._timers.remove(due)
            self.now = due[0]
            due[1]()
        self.now = end
