# SPDX-License-Identifier: GPL-2.0-or-later
"""Garbage collection of the window's programs: in the main thread only, and mostly of what is new.

Python itself collects in whichever thread allocates. A widget that is collected in a worker is destroyed
there, beside the main loop, and GTK takes no calls from other threads. Python also looks at everything there
is, and with many rules holds its lock for up to a quarter of a second.
"""

import gc
import time
from collections.abc import Callable

ALL_EVERY_S = 600.0
"""How often everything is looked at, also what was long in use, such as dialogs."""


class _State:
    """Of this process, as Python's own is."""

    looked_at_all = 0.0


def begin(clock: Callable[[], float] = time.monotonic) -> None:
    """Have only `collect` collect garbage, and leave alone what is there now: modules, mostly."""
    gc.collect()
    gc.freeze()
    gc.disable()
    _State.looked_at_all = clock()


def collect(clock: Callable[[], float] = time.monotonic) -> None:
    """Collect garbage, unless Python does so itself. Only the main thread may call this."""
    if gc.isenabled():
        return
    now = clock()
    is_for_all = now >= _State.looked_at_all + ALL_EVERY_S
    if is_for_all:
        _State.looked_at_all = now
    gc.collect(2 if is_for_all else 1)
