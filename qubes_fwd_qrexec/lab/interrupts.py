# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals that end a program, as KeyboardInterrupt, so that a command can undo what it has begun."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _State:
    """Of this process, as its signal handlers are."""

    is_deferred = False
    is_due = False
    has_come = False


def _signalled(_number: int, _frame: object) -> None:
    """A terminal that closes sends several signals; none of them may interrupt the cleaning up."""
    if _State.has_come:
        return
    _State.has_come = True
    if not _State.is_deferred:
        raise KeyboardInterrupt
    _State.is_due = True


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within the block, the first signal that ends a program is raised as KeyboardInterrupt.

    SIGINT too: a shell that starts a program in the background has it ignore that one.
    """
    _State.has_come = _State.is_due = False
    before = {number: signal.signal(number, _signalled) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Until the block of `ended_by_signals` is left, as the cleaning up begins."""
    _State.has_come = True


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Within the block no interrupt is raised; one that came is raised at its end.

    For the start of a program: nobody would end it otherwise.
    """
    _State.is_deferred = True
    try:
        yield
    finally:
        _State.is_deferred = False
    if _State.is_due:
        _State.is_due = False
        raise KeyboardInterrupt
