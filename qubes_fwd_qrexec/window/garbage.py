# SPDX-License-Identifier: GPL-2.0-or-later
"""When a program of the window looks for garbage: in its main thread alone, and mostly among what is new.

Python itself looks in whatever thread makes something. A widget that it finds in a worker is destroyed there,
beside the main loop, and GTK takes no calls of other threads. It also looks at all that there is, and holds
its lock for up to a quarter of a second with many rules.
"""

import gc
import time
from collections.abc import Callable

ALL_EVERY_S = 600.0
"""How often all is looked at, also what was in use for long, such as dialogs."""


class _State:
    """Of this process, as Python's own is."""

    looked_at_all = 0.0


def begin(clock: Callable[[], float] = time.monotonic) -> None:
    """Have garbage looked for by `collect` alone, and never among what there is now: modules, mostly."""
    gc.collect()
    gc.freeze()
    gc.disable()
    _State.looked_at_all = clock()


def collect(clock: Callable[[], float] = time.monotonic) -> None:
    """Look for garbage, if nobody else does. For the main thread."""
    if gc.isenabled():
        return
    now = clock()
    is_for_all = now >= _State.looked_at_all + ALL_EVERY_S
    if is_for_all:
        _State.looked_at_all = now
    gc.collect(2 if is_for_all else 1)
