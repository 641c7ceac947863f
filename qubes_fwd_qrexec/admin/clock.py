# SPDX-License-Identifier: GPL-2.0-or-later
"""The time by which rules end, for a program that runs on: a clock that never goes back, and its alarm.

A rule's end is a time of day, and the time of day can be set: back, by hand or by the qube that dom0
takes its time from, and a rule would live longer than its user was told. So the clock here is the later
of the wall clock and what it was before plus the time that has passed since, suspend included
(CLOCK_BOOTTIME). Whoever sets the clock forward by mistake closes rules early, and they stay closed until
this program starts again: the safe side.
"""

import ctypes
import errno
import os
import time
from collections.abc import Callable

# linux/timerfd.h and linux/time.h
_TFD_TIMER_ABSTIME = 1
_TFD_TIMER_CANCEL_ON_SET = 2


def _elapsed() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Clock:
    """UNIX seconds that never go back."""

    def __init__(
        self, wall: Callable[[], float] = time.time, elapsed: Callable[[], float] = _elapsed
    ) -> None:
        self._wall = wall
        self._elapsed = elapsed
        self._now = wall()
        self._elapsed_then = elapsed()

    def now(self) -> float:
        elapsed = self._elapsed()
        self._now = max(self._wall(), self._now + elapsed - self._elapsed_then)
        self._elapsed_then = elapsed
        return self._now

    def ahead_s(self) -> float:
        """How far this clock is ahead of the wall clock, because that was set back."""
        return max(0.0, self.now() - self._wall())


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Alarm:
    """A descriptor that becomes readable at a time of the wall clock, and whenever that clock is set.

    timerfd_create(2) with CLOCK_REALTIME and TFD_TIMER_CANCEL_ON_SET, which the kernel also cancels when
    the machine resumes. It costs nothing until then; a wait with a timeout would go on for what was left
    of it after a resume, as its clock stands still in suspend, or would have to wake up every few seconds.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.timerfd_create(time.CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def __enter__(self) -> "Alarm":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        return self._fd

    def set(self, wall: float | None) -> None:
        """Ring at this time, at once if it is past, or with None never; what rang before is over."""
        value = _Timespec(0, 0)
        if wall is not None:
            # Zero and zero would disarm it.
            nanoseconds = max(1, int(wall * 1_000_000_000))
            value = _Timespec(*divmod(nanoseconds, 1_000_000_000))
        new = _Itimerspec(_Timespec(0, 0), value)
        flags = _TFD_TIMER_ABSTIME | _TFD_TIMER_CANCEL_ON_SET
        if self._libc.timerfd_settime(self._fd, flags, ctypes.byref(new), None) < 0:
            code = ctypes.get_errno()
            # timerfd_create(2): the clock was set since the last time, and the timer is armed all the same.
            if code != errno.ECANCELED:
                raise OSError(code, os.strerror(code))
