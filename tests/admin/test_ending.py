# SPDX-License-Identifier: GPL-2.0-or-later
"""Both signals, sent by this process to itself: Python takes them up before the next line."""

import os
import select
import signal
from contextlib import suppress

import pytest

from qubes_fwd_qrexec.admin.ending import Ending


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_wish_that_stays(number: signal.Signals) -> None:
    with Ending() as ending:
        assert not ending.is_asked
        assert select.select([ending], [], [], 0)[0] == []
        for _ in range(2):
            os.kill(os.getpid(), number)
            assert ending.is_asked
            assert select.select([ending], [], [], 0)[0] == [ending]


def test_what_was_before_is_there_again() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Ending():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    wakeup_fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup_fd)
    assert wakeup_fd == -1


def test_so_many_signals_that_nobody_reads_are_no_trouble() -> None:
    with Ending() as ending:
        with suppress(BlockingIOError):
            while True:
                os.write(ending._write_fd, bytes(4096))
        os.kill(os.getpid(), signal.SIGTERM)
        assert ending.is_asked
