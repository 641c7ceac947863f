# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwards whose ports could not be bound, and when to try each again.

The program that has the port may end, and an address may come back with its network: no event says so.
"""

import time
from collections.abc import Callable

from qubes_fwd_qrexec.common.config import ListenerConfig

# Soon at first, as the program that has the port may just be ending; then ever more rarely.
RETRY_FIRST_S = 1.0
RETRY_MAX_S = 60.0


class _Waiting:
    def __init__(self, config: ListenerConfig, problem: str, wait_s: float, now: float) -> None:
        self.config = config
        self.problem = problem
        self.wait_s = wait_s
        self.due_at = now + wait_s


class Unopened:
    """The forwards that wait, by their keys; each wait doubles with each failure."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[str, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def failed(self, key: str, config: ListenerConfig, problem: str) -> bool:
        """A forward could not be opened. Returns whether that, or the reason, is new."""
        before = self._waiting.get(key)
        wait_s = RETRY_FIRST_S if before is None else min(2 * before.wait_s, RETRY_MAX_S)
        self._waiting[key] = _Waiting(config, problem, wait_s, self._clock())
        return before is None or before.problem != problem

    def forget(self, key: str) -> None:
        """A forward is open, or no longer configured."""
        self._waiting.pop(key, None)

    def forget_all(self) -> None:
        """The configuration has changed, and everything in it is tried at once."""
        self._waiting.clear()

    @property
    def problems(self) -> dict[str, str]:
        """Why each one is not open, by the key of its configuration."""
        return {key: waiting.problem for key, waiting in self._waiting.items()}

    def due(self) -> list[tuple[str, ListenerConfig]]:
        """The forwards to try now; report the result with `failed` or `forget`."""
        now = self._clock()
        return [(key, waiting.config) for key, waiting in self._waiting.items() if waiting.due_at <= now]
