# SPDX-License-Identifier: GPL-2.0-or-later
"""When a forward ends, by two clocks, so that neither suspend nor a clock set back prolongs it."""

import math
import time


class Expiry:
    """Over when the wall clock says so, or CLOCK_BOOTTIME, which nobody can set and which runs in suspend.

    ``expire``: the end in UNIX seconds; None for no end.
    """

    def __init__(self, expire: int | None) -> None:
        self._wall_s = math.inf if expire is None else expire
        self._boot_s = time.clock_gettime(time.CLOCK_BOOTTIME) + self._wall_s - time.time()

    def is_over(self) -> bool:
        return time.time() >= self._wall_s or time.clock_gettime(time.CLOCK_BOOTTIME) >= self._boot_s
