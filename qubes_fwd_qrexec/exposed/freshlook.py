# SPDX-License-Identifier: GPL-2.0-or-later
"""A look of the listener for whoever asks how it is, so that the answer is about what is configured now.

dom0 asks as soon as it has told this qube of a change. QubesDB has that by then (docs/facts.md, A11).
"""

import math
from collections.abc import Callable
from contextlib import suppress

import trio

from qubes_fwd_qrexec.system.configsource import ConfigSource

# A look takes milliseconds. With a QubesDB that hangs, the answer is about what was read before.
BOUND_S = 1.0
# The least time between two, as whoever is in this qube may ask without end.
GAP_S = 0.1
_CUTTING_LOOK_S = 0.01


class FreshLook:
    """Makes the looks. Whoever asks during one waits for the next, together with all the others."""

    def __init__(
        self, source: ConfigSource, look: Callable[[], None], is_cutting: Callable[[], bool]
    ) -> None:
        """``is_cutting``: whether connections that ``look`` has cut have not ended yet."""
        self._source = source
        self._look = look
        self._is_cutting = is_cutting
        self._lock = trio.Lock()
        self._begun = 0
        self._ended = 0
        self._next_at = -math.inf

    async def __call__(self) -> None:
        """Return after a look that begins from now on, or after `BOUND_S`."""
        before = self._begun
        with trio.move_on_after(BOUND_S):
            async with self._lock:
                if self._ended > before:
                    return
                await trio.sleep_until(self._next_at)
                self._next_at = trio.current_time() + GAP_S
                self._begun += 1
                await self._refreshed()
                self._look()
                while self._is_cutting():  # noqa: ASYNC110 - their ends are in many places
                    await trio.sleep(_CUTTING_LOOK_S)
                self._ended = self._begun

    async def _refreshed(self) -> None:
        """Return when the source knows what is configured now."""
        token, is_done = trio.lowlevel.current_trio_token(), trio.Event()

        def done() -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(is_done.set)

        self._source.refresh(done)
        await is_done.wait()
