# SPDX-License-Identifier: GPL-2.0-or-later
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_fwd_qrexec.common.errors import RemoteProtocolError
from qubes_fwd_qrexec.mux.credit import Credit
from qubes_fwd_qrexec.mux.limits import (
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
    credit = Credit(available, 0)
    assert credit.sendable_bytes == sendable
    if sendable:
        assert credit.spend(sendable)
        assert credit.available == available - sendable - FRAME_COST_BYTES


def test_spending_past_the_credit_takes_nothing():
    credit = Credit(100, 0)
    assert not credit.spend(37)
    assert credit.available == 100
    assert credit.spend(36)
    assert credit.available == 0


@pytest.mark.parametrize("increment", [0, 1, MIN_CREDIT_BYTES - 1])
def test_a_credit_below_the_least_is_the_peers_fault(increment):
    with pytest.raises(RemoteProtocolError, match="at least 1024"):
        Credit(0, 0).replenish(increment, MAX_WINDOW_BYTES)


def test_a_credit_past_the_window_is_the_peers_fault():
    credit = Credit(4096, 0)
    credit.replenish(4096, 8192)
    with pytest.raises(RemoteProtocolError, match="past the window of 8192"):
        credit.replenish(1024, 8192)
    assert credit.available == 8192


def test_data_past_the_credit_is_the_peers_fault():
    credit = Credit(0, 1000)
    credit.receive(1000)
    with pytest.raises(RemoteProtocolError, match="1 bytes past"):
        credit.receive(1)


def test_small_grants_are_sent_together_once_the_peer_gains_half_of_its_window():
    credit = Credit(0, 4096)
    credit.receive(2048)
    assert [credit.grant(512) for _ in range(4)] == [0, 0, 0, 2048]
    assert (credit.outstanding, credit.held) == (4096, 0)


def test_what_is_not_used_comes_back_and_what_may_be_kept_is_left():
    sender, receiver = Credit(10_000, 0), Credit(0, 10_000)
    assert receiver.recall(4096)
    sender.note_recall()
    assert sender.give_back(4096) == 5904
    receiver.take_back(5904)
    assert sender.available == receiver.outstanding == 4096
    assert sender.give_back(8192) == 0


def test_nothing_is_asked_for_where_there_is_no_more_or_twice():
    receiver = Credit(0, 4096)
    assert not receiver.recall(4096)
    assert receiver.recall(2048)
    assert not receiver.recall(2048)
    receiver.take_back(0)
    assert not receiver.recall(2048), "it has answered, and got nothing since"
    assert receiver.grant(8192)
    assert receiver.recall(2048)
    assert receiver.grant(20_000)
    assert not receiver.recall(2048), "it has not answered"


def test_a_peer_that_asks_again_has_granted_something_meanwhile():
    sender = Credit(4096, 0)
    sender.note_recall()
    with pytest.raises(RemoteProtocolError, match="a second RECALL"):
        sender.note_recall()
    sender.replenish(1024, 8192)
    sender.note_recall()


@pytest.mark.parametrize(("keep", "amount"), [(2048, 2049), (4095, 2), (2048, 4097)])
def test_giving_back_more_than_was_asked_for_is_the_peers_fault(keep, amount):
    receiver = Credit(0, 4096)
    assert receiver.recall(keep)
    with pytest.raises(RemoteProtocolError, match=f"RETURN of {amount} bytes of 4096, where {keep}"):
        receiver.take_back(amount)


def test_giving_back_unasked_is_the_peers_fault():
    receiver = Credit(0, 4096)
    with pytest.raises(RemoteProtocolError, match="answers no RECALL"):
        receiver.take_back(0)
    assert receiver.recall(2048)
    receiver.take_back(2048)
    with pytest.raises(RemoteProtocolError, match="answers no RECALL"):
        receiver.take_back(0)


@settings(derandomize=True)
@given(
    window=st.integers(MIN_WINDOW_BYTES, 100_000),
    starts_empty=st.booleans(),
    steps=st.lists(
        st.tuples(st.sampled_from(("send", "read", "recall")), st.integers(1, MAX_DATA_BYTES)), max_size=60
    ),
)
def test_both_ends_agree_and_a_stream_never_stops_for_good(window, starts_empty, steps):
    sender = Credit(0 if starts_empty else window, 0)
    receiver = Credit(0, sender.available)
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
    for what, size in steps:
        if what == "recall":
            if receiver.recall(max(size, MIN_WINDOW_BYTES)):
                sender.note_recall()
                returned = sender.give_back(max(size, MIN_WINDOW_BYTES))
                receiver.take_back(returned)
                window -= returned
                told = receiver.grant(0)
                if told:
                    sender.replenish(told, window)
        elif what == "send" and sender.sendable_bytes:
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
