# SPDX-License-Identifier: GPL-2.0-or-later
from qubes_fwd_qrexec.mux import wire
from qubes_fwd_qrexec.mux.limits import COPY_BYTES
from qubes_fwd_qrexec.mux.outbox import Outbox


def test_an_empty_outbox_gives_nothing():
    outbox = Outbox()
    assert outbox.take() == []
    assert outbox.bytes_queued == 0


def test_small_frames_are_joined_in_order():
    outbox = Outbox()
    outbox.add_control(wire.encode_eof(1))
    outbox.add_data(2, b"abc", 3)
    outbox.add_control(wire.encode_eof(2))
    assert (outbox.bytes_queued, outbox.control_bytes) == (27, 16)
    [joined] = outbox.take()
    assert joined == wire.encode_eof(1) + wire.data_header(2, 3) + b"abc" + wire.encode_eof(2)
    assert (outbox.bytes_queued, outbox.control_bytes) == (0, 0)
    assert outbox.take() == []


def test_large_payloads_are_not_copied():
    outbox = Outbox()
    small, large = bytes(COPY_BYTES), bytes(COPY_BYTES + 1)
    outbox.add_data(1, large, len(large))
    outbox.add_data(1, small, len(small))
    outbox.add_data(1, large, len(large))
    queued = outbox.bytes_queued
    ready = outbox.take()
    assert [piece is large for piece in ready] == [False, True, False, True]
    assert sum(map(len, ready)) == queued == 3 * 8 + 2 * len(large) + len(small)


def test_datagrams_are_queued_behind_their_segment():
    outbox = Outbox()
    large = bytes(COPY_BYTES + 1)
    outbox.add_datagrams(2, 0, b"", 0)
    outbox.add_datagrams(3, 2, b"aab", 3)
    outbox.add_datagrams(4, 0, large, len(large))
    assert (outbox.bytes_queued, outbox.control_bytes) == (3 * 10 + 3 + len(large), 0)
    joined, by_reference = outbox.take()
    headers = [wire.datagrams_header(*header) for header in ((2, 0, 0), (3, 2, 3), (4, 0, len(large)))]
    assert joined == headers[0] + headers[1] + b"aab" + headers[2]
    assert by_reference is large


def test_what_was_taken_does_not_change_by_what_is_added():
    outbox = Outbox()
    outbox.add_control(b"one")
    [taken] = outbox.take()
    outbox.add_control(b"two")
    assert taken == b"one"
    assert outbox.take() == [b"two"]
