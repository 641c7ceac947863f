# SPDX-License-Identifier: GPL-2.0-or-later
"""Processor time is told of processes that run and of those that have ended."""

import os
import subprocess
import sys
import time

from bench.memory import Members
from bench.processor import Usage, usage, used_s

BURN = "import time\nwhile time.process_time() < 0.05: pass"


def of(pid: int) -> Members:
    return Members(peer=[pid], service=[], client=[], broker=[])


def test_this_process_has_used_what_its_clock_says() -> None:
    before = time.process_time()
    found = used_s(os.getpid())
    assert before <= found <= time.process_time()


def test_a_process_that_has_ended_is_counted_with_the_one_that_waited_for_it() -> None:
    before = usage(of(os.getpid()), ())
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", BURN]) as child:
        pass
    found = usage(of(os.getpid()), ()).since(before)
    assert used_s(child.pid) == 0
    assert found.ended >= 0.04
    assert found.between == found.peer + found.ended


def test_usage_is_told_by_whose_it_is_and_the_ends_are_not_between() -> None:
    found = Usage(peer=1, service=2, client=4, broker=8, ended=16, ends=32)
    assert found.between == 31
    assert found.since(Usage(1, 1, 1, 1, 1, 1)) == Usage(0, 1, 3, 7, 15, 31)
    assert found.each(2) == Usage(0.5, 1, 2, 4, 8, 16)
