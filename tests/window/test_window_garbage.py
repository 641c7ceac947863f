# SPDX-License-Identifier: GPL-2.0-or-later
"""A program of the window loses its garbage by itself, and only where it says so."""

import subprocess
import sys

from helpers import BOUND_S

# In a process of its own, as what it does is for the whole of a process.
PROGRAM = """\
import gc
import time
import weakref
from qubes_fwd_qrexec.window import garbage

class Ring:
    def __init__(self):
        self.itself = self

garbage.begin()
assert not gc.isenabled() and gc.get_freeze_count() > 1000
new = weakref.ref(Ring())
for _ in range(3):
    [[] for _ in range(100_000)]
assert new() is not None, "nobody else looks for it"
old = Ring()
garbage.collect()
assert new() is None, "what is new goes at once"
garbage.collect()
kept = weakref.ref(old)
del old
garbage.collect()
assert kept() is not None, "what is old is not looked at each time"
later = time.monotonic() + garbage.ALL_EVERY_S
garbage.collect(lambda: later)
assert kept() is None, "and goes in the end"
"""


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=BOUND_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_new_is_looked_at_each_time_and_all_from_time_to_time() -> None:
    run(PROGRAM)


def test_where_python_looks_for_garbage_itself_nothing_is_done() -> None:
    run("import gc; from qubes_fwd_qrexec.window import garbage; gc.collect = None; garbage.collect()")
