# SPDX-License-Identifier: GPL-2.0-or-later
"""A reader that does not read never blocks the writer."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from qubes_fwd_qrexec.system.outlet import Outlet

Ends = tuple[int, int]


@contextlib.contextmanager
def pipe() -> Iterator[Ends]:
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(writing)
        with contextlib.suppress(OSError):
            os.close(reading)


@contextlib.contextmanager
def unix_stream() -> Iterator[Ends]:
    """What systemd gives a unit for its stderr."""
    one, other = socket.socketpair()
    with one, other:
        yield one.fileno(), other.fileno()


@contextlib.contextmanager
def terminal() -> Iterator[Ends]:
    ours, theirs = os.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(theirs)
        os.close(ours)


Make = Callable[[], contextlib.AbstractContextManager[Ends]]


@pytest.mark.parametrize("make", [pipe, unix_stream, terminal])
def test_what_nobody_reads_is_left_out_and_counted(make: Make) -> None:
    with make() as (reading, writing):
        outlet = Outlet(writing)
        said = 0
        while outlet.lost < 3:
            outlet.say(f"line {said} {'x' * 190}")
            said += 1
        os.set_blocking(reading, False)
        received = b""

        def read() -> None:
            nonlocal received
            with contextlib.suppress(BlockingIOError):
                while more := os.read(reading, 1 << 20):
                    received += more

        read()
        outlet.say("and on")
        read()
        lines = received.decode().splitlines()
        # A terminal may have taken part of one more, even all but its end.
        whole = [line.split()[1] for line in lines[:-2] if line.endswith("x" * 190)]
        assert whole[: said - 3] == [str(number) for number in range(said - 3)]
        assert lines[-2:] == ["warning: 3 lines are missing here, as nobody read what came before", "and on"]
        assert outlet.lost == 0


def test_a_reader_that_is_gone_harms_nobody() -> None:
    with pipe() as (reading, writing):
        os.close(reading)
        outlet = Outlet(writing)
        outlet.say("x")
        assert outlet.lost == 1


def test_only_ascii_goes_out() -> None:
    with pipe() as (reading, writing):
        Outlet(writing).say("\u202ea")
        assert os.read(reading, 100) == b"?a\n"
