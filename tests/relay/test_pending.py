# SPDX-License-Identifier: GPL-2.0-or-later
"""What waits for a socket goes out whole and in order, and small pieces are kept as one."""

import contextlib
import random

import pytest
from helpers import unix_pair

from qubes_fwd_qrexec.relay.pending import _JOIN_BYTES, Pending


def test_pieces_of_any_size_go_out_in_order_and_return_their_cost_once() -> None:
    chance = random.Random(5)
    pieces = [chance.randbytes(chance.choice([1, 64, 3000, 32768])) for _ in range(60)]
    pending = Pending(pieces[0], len(pieces[0]) + 64)
    for piece in pieces[1:]:
        pending.add(memoryview(piece), len(piece) + 64)
    cost = pending.cost
    assert cost == sum(len(piece) + 64 for piece in pieces)
    near, far = unix_pair()
    with near, far:
        got = bytearray()
        told = 0
        while pending:
            with contextlib.suppress(BlockingIOError):
                told += pending.send(near)
            with contextlib.suppress(BlockingIOError):
                got += far.recv(1 << 20)
        with contextlib.suppress(BlockingIOError):
            got += far.recv(1 << 20)
    assert bytes(got) == b"".join(pieces)
    assert told == cost


def test_small_pieces_are_kept_as_one_and_large_ones_as_they_are() -> None:
    pending = Pending(b"x", 65)
    for _ in range(_JOIN_BYTES - 1):
        pending.add(b"x", 65)
    assert len(pending) == 1
    pending.add(b"x", 65)
    assert len(pending) == 2
    pending.add(bytes(_JOIN_BYTES), _JOIN_BYTES + 64)
    assert len(pending) == 3


def test_a_broken_socket_is_left_to_the_caller() -> None:
    near, far = unix_pair()
    pending = Pending(b"x", 65)
    far.close()
    with near, pytest.raises(BrokenPipeError):
        pending.send(near)
