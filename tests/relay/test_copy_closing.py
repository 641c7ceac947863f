# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways to close a socket, beside `test_copy`."""

import select
import socket
import struct

import pytest
from helpers import BOUND_S, tcp_pair
from relay_bench import receive_all

from qubes_fwd_qrexec.relay.copy import abort, abort_by_default, close_well, half_close, undelivered_bytes


def test_abort_is_reset_and_close_well_is_an_end() -> None:
    far, near = tcp_pair()
    with far:
        abort(near)
        select.select([far], [], [], BOUND_S)
        with pytest.raises(ConnectionResetError):
            far.recv(1)
    far, near = tcp_pair()
    with far:
        far.send(bytes(300_000))
        select.select([near], [], [], BOUND_S)
        near.send(b"all of it")
        abort_by_default(near)
        close_well(near)
        assert receive_all(far) == b"all of it"


def test_a_bare_close_with_unread_bytes_would_be_an_abort() -> None:
    """The reason for `close_well`."""
    far, near = tcp_pair()
    with far:
        far.send(b"unread")
        select.select([near], [], [], BOUND_S)
        near.close()
        select.select([far], [], [], BOUND_S)
        with pytest.raises(ConnectionResetError):
            far.recv(1)


def test_closing_and_ending_what_is_gone_is_no_error() -> None:
    far, near = tcp_pair()
    abort(far)
    select.select([near], [], [], BOUND_S)
    half_close(near)
    close_well(near)
    abort(near)


def test_undelivered_bytes_are_those_that_no_peer_has() -> None:
    far, near = tcp_pair()
    with near:
        with far:
            assert undelivered_bytes(near) == 0
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            while select.select([], [near], [], 0)[1]:
                near.send(bytes(65536))
            assert undelivered_bytes(near) > 0
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        select.select([near], [], [], BOUND_S)
        assert undelivered_bytes(near) == 0
