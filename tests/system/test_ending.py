# SPDX-License-Identifier: GPL-2.0-or-later
"""Both signals, sent by this process to itself: Python takes them up before the next line."""

import os
import signal
import threading
import time

import pytest

from qubes_fwd_qrexec.system.ending import Ending


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_wish_that_stays(number: signal.Signals) -> None:
    with Ending() as ending:
        assert not ending.is_asked()
        for _ in range(2):
            os.kill(os.getpid(), number)
            assert ending.is_asked()
            assert ending.is_asked(3600.0)


def test_what_was_before_is_there_again() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Ending():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    wakeup_fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup_fd)
    assert wakeup_fd == -1


def test_a_wait_is_over_after_its_time() -> None:
    with Ending() as ending:
        begun = time.monotonic()
        assert not ending.is_asked(0.01)
        assert time.monotonic() - begun >= 0.01


def test_in_a_thread_nothing_is_told_and_nothing_changed() -> None:
    before, asked = signal.getsignal(signal.SIGINT), list[bool]()

    def enter() -> None:
        with Ending() as ending:
            asked.append(ending.is_asked() or signal.getsignal(signal.SIGINT) is not before)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert asked == [False]
