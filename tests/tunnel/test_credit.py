# SPDX-License-Identifier: GPL-2.0-or-later
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_fwd_qrexec.errors import RemoteProtocolError
from qubes_fwd_qrexec.tunnel.credit import ReceiveCredit, SendCredit
from qubes_fwd_qrexec.tunnel.limits import (
    FRAME_COST_BYTES,
    MAX_DATA_BYTES,
    MAX_WINDOW_BYTES,
    MIN_CREDIT_BYTES,
    MIN_WINDOW_BYTES,
)


@pytest.mark.parametrize(
    ("available", "sendable"),
    [(0, 0), (64, 0), (65, 1), (64 + 32768, 32768), (64 + 32769, 32768), (MAX_WINDOW_BYTES, 32768)],
)
def test_a_frame_may_be_as_long_as_credit_less_its_cost_allows(available, sendable):
    credit = SendCredit(available)
    assert credit.sendable_bytes == sendable
    if sendable:
        assert credit.spend(sendable)
        assert credit.available == available - sendable - FRAME_COST_BYTES


def test_spending_past_the_credit_takes_nothing():
    credit = SendCredit(100)
    assert not credit.spend(37)
    assert credit.available == 100
    assert credit.spend(36)
    assert credit.available == 0


@pytest.mark.parametrize("increment", [0, 1, MIN_CREDIT_BYTES - 1])
def test_a_credit_below_the_least_is_the_peers_fault(increment):
    with pytest.raises(RemoteProtocolError, match="at least 1024"):
        SendCredit(0).replenish(increment, MAX_WINDOW_BYTES)


def test_a_credit_past_the_window_is_the_peers_fault():
    credit = SendCredit(4096)
    credit.replenish(4096, 8192)
    with pytest.raises(RemoteProtocolError, match="past the window of 8192"):
        credit.replenish(1024, 8192)
    assert credit.available == 8192


def test_data_past_the_credit_is_the_peers_fault():
    credit = ReceiveCredit(1000)
    credit.receive(1000)
    with pytest.raises(RemoteProtocolError, match="1 bytes past"):
        credit.receive(1)


def test_small_grants_are_told_together_once_the_peer_gains_half_of_its_window():
    credit = ReceiveCredit(4096)
    credit.receive(2048)
    assert [credit.grant(512) for _ in range(4)] == [0, 0, 0, 2048]
    assert (credit.outstanding, credit.held) == (4096, 0)


@settings(derandomize=True)
@given(
    window=st.integers(MIN_WINDOW_BYTES, 100_000),
    starts_empty=st.booleans(),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, MAX_DATA_BYTES)), max_size=60),
)
def test_both_ends_agree_and_a_stream_never_stops_for_good(window, starts_empty, steps):
    sender = SendCredit(0 if starts_empty else window)
    receiver = ReceiveCredit(sender.available)
    unread = 0

    def consume(amount):
        nonlocal unread
        unread -= amount
        told = receiver.grant(amount)
        if told:
            sender.replenish(told, window)

    if starts_empty:
        unread = window
        consume(window)
    for is_send, size in steps:
        if is_send and sender.sendable_bytes:
            length = min(size, sender.sendable_bytes)
            assert sender.spend(length)
            receiver.receive(length + FRAME_COST_BYTES)
            unread += length + FRAME_COST_BYTES
        elif unread:
            consume(min(size, unread))
        assert sender.available == receiver.outstanding
        assert receiver.granted + unread == window
    if unread:
        consume(unread)
    assert sender.sendable_bytes > 0
