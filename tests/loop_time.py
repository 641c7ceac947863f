# SPDX-License-Identifier: GPL-2.0-or-later
"""The time of the loop that moves bytes, in the hands of a test: no other load comes into it."""

import math
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

from qubes_fwd_qrexec.relay import flowmux, leg, loop, mux
from qubes_fwd_qrexec.relay.loop import End, Loop, Timer
from qubes_fwd_qrexec.target import callservice

# What is to come within a second then comes within BOUND_S of the tests if no timer is waited for, and what
# waits for one of a fifth of a second does not. A look after 5 ms at what the kernel has sent is still borne.
SLOWNESS = 1000.0


def slow_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every timer of every loop takes so much longer: what comes all the same, comes by itself."""
    real = Loop.after

    def after(self: Loop, delay_s: float, callback: Callable[[], None], end: End) -> Timer:
        return real(self, delay_s * SLOWNESS, callback, end)

    monkeypatch.setattr(Loop, "after", after)


def exact_s(seconds: float) -> float:
    """As many seconds, or up to a millionth more, that add up and compare without an error of rounding.

    Any sum of such values below 2**32 is a float. 299.9 and 0.1 s then are 300 s, whenever that begins.
    """
    return math.ceil(seconds * 2**20) / 2**20


class LoopClock:
    """The clock of loops, of what they turn and of ``more``: it stands still but for `advance`, until it is
    let go."""

    def __init__(self, *more: ModuleType) -> None:
        self.now = exact_s(time.monotonic())
        modules = loop, leg, mux, flowmux, callservice, *more
        self._before = [(module, vars(module)["time"]) for module in modules]
        for module, _ in self._before:
            vars(module)["time"] = SimpleNamespace(monotonic=lambda: self.now)

    def advance(self, seconds: float) -> None:
        """What is due then happens in the next turn of the loop."""
        self.now += exact_s(seconds)

    def let_go(self) -> None:
        for module, before in self._before:
            vars(module)["time"] = before
