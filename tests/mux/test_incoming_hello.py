# SPDX-License-Identifier: GPL-2.0-or-later
"""What a peer may say first, and which versions are understood."""

import pytest

from qubes_fwd_qrexec.mux import wire
from qubes_fwd_qrexec.mux.messages import GoawayCode, Hello

from .helpers import (
    WINDOW,
    data_frame,
    feed,
    fresh,
    goaway_frame,
    hello,
    open_frame,
    raw_frame,
    ready,
    refuses,
    reset_frame,
)


@pytest.mark.parametrize("side", ["listener", "target"])
@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"Welcome to Debian\n", "unknown frame type 87"),
        (raw_frame(1, payload=bytes(40)), "the HELLO begins with"),
        (wire.encode_ping(b"12345678"), "PING before HELLO"),
        (goaway_frame(0, GoawayCode.DONE, True), "GOAWAY before HELLO"),
        (open_frame(1), "OPEN before HELLO"),
        (data_frame(1), "DATA before HELLO"),
        (reset_frame(1), "RESET before HELLO"),
    ],
)
def test_hello_comes_first(side, data, problem):
    refuses(fresh(side), data, problem)


def test_an_echo_is_not_taken_for_a_peer():
    refuses(fresh("listener"), wire.encode_hello(hello("listener")), "both ends say .* listener side")
    refuses(fresh("target"), wire.encode_hello(hello("target")), "both ends say .* target side")


def test_a_second_hello_is_refused():
    refuses(ready("target"), wire.encode_hello(hello("listener")), "a second HELLO")


@pytest.mark.parametrize(("lowest", "highest"), [(3, 3), (3, 9)])
def test_no_version_in_common_is_a_clear_error(lowest, highest):
    peer = wire.encode_hello(hello("target", min_version=lowest, max_version=highest))
    problem = f"speaks versions {lowest} to {highest} of the mux protocol, this end 1 to 2"
    refuses(fresh("listener"), peer, problem, GoawayCode.NO_COMMON_VERSION)


def test_no_version_in_common_is_reported_before_later_values_are_checked():
    later = bytes.fromhex("71667764 2d6d7578 0003 0004") + b"\xff" * 28
    refuses(fresh("listener"), raw_frame(1, payload=later), "3 to 4", GoawayCode.NO_COMMON_VERSION)


def test_the_lower_of_the_highest_versions_is_used():
    listener = fresh("listener", max_version=3)
    feed(listener, wire.encode_hello(hello("target", max_version=2)))
    assert listener.version == 2
    refuses(
        fresh("listener", min_version=3, max_version=4),
        wire.encode_hello(hello("target")),
        "versions 1 to 2 .* 3 to 4",
        GoawayCode.NO_COMMON_VERSION,
    )


def test_a_peer_of_a_later_version_is_understood():
    later = Hello(WINDOW, b"n" * 16, 5, 60, 1, 7)
    frame = wire.encode_hello(later)
    longer = raw_frame(1, 0, frame[8:] + b"something new")
    listener = fresh("listener")
    [event] = feed(listener, longer)
    assert (event.hello, listener.version) == (later, 2)
