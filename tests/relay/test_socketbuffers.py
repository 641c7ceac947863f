# SPDX-License-Identifier: GPL-2.0-or-later
"""What sockets may hold in the kernel: lent, grown by use, given back when empty; what they do hold."""

import contextlib
import select
import socket
import time
from collections.abc import Iterator

import pytest
from bounds import BOUND_S
from helpers import tcp_pair
from hypothesis import given
from hypothesis import strategies as st

from qubes_fwd_qrexec.relay.socketbuffers import (
    FLOOR_BYTES,
    HELD_BYTES,
    MAX_BYTES,
    SHARED_BYTES,
    START_BYTES,
    SocketBuffer,
    SocketMemory,
    held_bytes,
    limit_segments,
    set_size,
)

KIB = 1 << 10
MIB = 1 << 20
# Beside its buffer a socket holds the last segment that it let in: 64 KiB on loopback, with what the kernel
# needs for that.
_SEGMENT_BYTES = 80 * KIB


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = tcp_pair()
    with near, far:
        yield near, far


def size_of(sock: socket.socket, option: int = socket.SO_RCVBUF) -> int:
    """What the kernel says it allows."""
    return sock.getsockopt(socket.SOL_SOCKET, option)


@pytest.mark.parametrize("option", [socket.SO_SNDBUF, socket.SO_RCVBUF])
def test_the_kernel_is_told_and_allows_twice_as_much(
    pair: tuple[socket.socket, socket.socket], option: int
) -> None:
    account = SocketMemory()
    buffer = SocketBuffer(account, pair[0], option)
    assert buffer.size == START_BYTES
    assert size_of(pair[0], option) == 2 * START_BYTES
    assert account.left == SHARED_BYTES - 2 * (START_BYTES - FLOOR_BYTES)


def test_who_moves_much_gets_more_up_to_the_largest(pair: tuple[socket.socket, socket.socket]) -> None:
    account = SocketMemory()
    buffers = SocketBuffer(account, pair[0], socket.SO_RCVBUF)
    seen = []
    for _ in range(4):
        buffers.grow(buffers.grow_at)
        seen.append(buffers.size)
    assert seen == [2 * START_BYTES, MAX_BYTES, MAX_BYTES, MAX_BYTES]
    assert size_of(pair[0]) == 2 * MAX_BYTES
    assert account.buffers == 1
    buffers.leave()
    assert (account.left, account.buffers, account.held) == (SHARED_BYTES, 0, 0)


def test_where_little_is_left_it_stays_small_and_grows_when_there_is_more(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    account = SocketMemory(MIB)
    buffers = SocketBuffer(account, pair[0], socket.SO_RCVBUF)
    assert buffers.size == FLOOR_BYTES
    buffers.grow(buffers.grow_at)
    assert buffers.size == FLOOR_BYTES
    account.left = SHARED_BYTES
    buffers.grow(buffers.grow_at)
    assert buffers.size == 2 * FLOOR_BYTES


def test_what_is_empty_and_unused_is_given_back_and_what_is_full_or_used_is_not(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    account = SocketMemory()
    buffers = SocketBuffer(account, near, socket.SO_RCVBUF)
    lent = account.total - account.left
    buffers.look(0)
    assert buffers.size == START_BYTES, "there is enough"
    account.left = 0
    buffers.look(START_BYTES)
    assert buffers.size == START_BYTES, "it was used"
    far.send(b"x")
    assert select.select([near], [], [], 10)[0]
    buffers.look(START_BYTES)
    assert buffers.size == START_BYTES, "the kernel holds something"
    assert near.recv(1) == b"x"
    buffers.look(START_BYTES)
    assert (buffers.size, account.left) == (FLOOR_BYTES, lent)
    assert size_of(near) == 2 * FLOOR_BYTES
    assert buffers.grow_at == START_BYTES + 2 * FLOOR_BYTES, (
        "twice its size is to move first, as at the beginning"
    )
    account.left = SHARED_BYTES
    buffers.grow(buffers.grow_at)
    assert buffers.size == 2 * FLOOR_BYTES


@given(st.lists(st.tuples(st.sampled_from(("begin", "grow", "look", "leave")), st.integers(0, 40))))
def test_what_is_lent_never_exceeds_the_bound_and_all_comes_back(steps: list[tuple[str, int]]) -> None:
    near, far = tcp_pair()
    account = SocketMemory(8 * MIB)
    live: list[tuple[SocketBuffer, int]] = []
    with near, far:
        for what, number in steps:
            if what == "begin":
                live.append((SocketBuffer(account, near, socket.SO_RCVBUF), 0))
                continue
            if not live:
                continue
            buffers, moved = live.pop(number % len(live))
            if what == "grow":
                moved = buffers.grow_at
                buffers.grow(moved)
            elif what == "look":
                buffers.look(moved)
            else:
                buffers.leave()
                continue
            live.append((buffers, moved))
            lent = sum(2 * (buffers.size - FLOOR_BYTES) for buffers, _ in live)
            assert 0 <= account.left == account.total - lent
        for buffers, _ in live:
            buffers.leave()
    assert account.left == account.total


def test_where_many_hold_too_much_those_that_stand_still_with_most_of_it_are_cut() -> None:
    account = SocketMemory()
    account.buffers = 1000
    with contextlib.ExitStack() as stack:
        pairs = [tcp_pair() for _ in range(4)]
        for pair in pairs:
            for sock in pair:
                stack.enter_context(sock)
        full, slow, small, empty = (SocketBuffer(account, near, socket.SO_RCVBUF) for near, _ in pairs)
        for _, far in pairs[:2]:
            far.send(bytes(60_000))
        pairs[2][1].send(b"x")
        for near, _ in pairs[:3]:
            assert select.select([near], [], [], 10)[0]
        looks = {full: 0, slow: 1, small: 0, empty: 0}
        for buffers, moved in looks.items():
            buffers.look(moved)
        assert account.held == sum(held_bytes(near, socket.SO_RCVBUF) for near, _ in pairs)
        assert not any(buffers.is_too_much for buffers in looks), "it is not too much yet"
        account.held += HELD_BYTES
        account.buffers = 2000
        assert [buffers.is_too_much for buffers in looks] == [False] * 4, "others hold more"
        account.buffers = 200_000
        assert [buffers.is_too_much for buffers in looks] == [True, False, True, False]
        full.leave()
        small.leave()
        assert account.held == HELD_BYTES + held_bytes(pairs[1][0], socket.SO_RCVBUF)


def stall(near: socket.socket, far: socket.socket) -> None:
    """Both send until nothing is taken any more."""
    for sock in (near, far):
        sock.setblocking(False)
    while select.select([], [near, far], [], 0.02)[1]:
        for sock in (near, far):
            with contextlib.suppress(BlockingIOError):
                while sock.send(bytes(32 * KIB)):
                    pass


@pytest.mark.parametrize("size", [FLOOR_BYTES, START_BYTES, MAX_BYTES])
def test_a_socket_that_stalls_both_ways_holds_twice_its_sizes_and_a_segment_each(size: int) -> None:
    near, far = tcp_pair()
    with near, far:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            buffer = SocketBuffer(SocketMemory(MIB if size == FLOOR_BYTES else SHARED_BYTES), near, option)
            while buffer.size < size:
                buffer.grow(buffer.grow_at)
            assert buffer.size == size
        stall(near, far)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            assert size // 2 <= held_bytes(near, option) <= 2 * size + _SEGMENT_BYTES


def test_a_hundred_that_stall_at_the_size_they_have_hold_little_more_than_is_lent() -> None:
    account = SocketMemory(8 * MIB)
    options = socket.SO_SNDBUF, socket.SO_RCVBUF
    with contextlib.ExitStack() as stack:
        pairs = [tcp_pair() for _ in range(100)]
        for near, far in pairs:
            stack.enter_context(near)
            stack.enter_context(far)
            for option in options:
                SocketBuffer(account, near, option)
        for near, far in pairs:
            stall(near, far)
        held = sum(held_bytes(near, option) for near, _ in pairs for option in options)
    assert held <= 8 * MIB + len(pairs) * 2 * (2 * FLOOR_BYTES + _SEGMENT_BYTES)


def test_with_the_smallest_buffers_nobody_waits_for_a_timer() -> None:
    """At 40 to 200 ms for each 8 KiB it would take minutes."""
    with socket.socket() as listening, socket.socket() as near:
        for sock in (listening, near):
            limit_segments(sock)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        near.connect(listening.getsockname())
        far, _ = listening.accept()
        with far:
            for sock in (near, far):
                set_size(sock, FLOOR_BYTES)
                sock.setblocking(False)
            sent = received = 0
            deadline = time.monotonic() + BOUND_S
            while received < 16 * MIB:
                assert time.monotonic() < deadline, f"{received} bytes"
                readable, writable, _ = select.select([far], [near] if sent < 16 * MIB else [], [], 1)
                if writable:
                    sent += near.send(bytes(min(32 * KIB, 16 * MIB - sent)))
                if readable:
                    received += len(far.recv(32 * KIB))
