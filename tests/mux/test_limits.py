# SPDX-License-Identifier: GPL-2.0-or-later
from qubes_fwd_qrexec.mux import limits


def test_the_least_window_is_enough_for_a_frame_and_a_credit():
    assert limits.MIN_WINDOW_BYTES > limits.MIN_CREDIT_BYTES + limits.FRAME_COST_BYTES


def test_a_frame_of_the_greatest_length_fits_its_field_and_the_greatest_window():
    assert limits.MAX_DATA_BYTES <= 0xFFFF
    assert limits.MAX_DATA_BYTES + limits.FRAME_COST_BYTES <= limits.MAX_WINDOW_BYTES


def test_a_frame_of_datagrams_fits_its_field_and_the_longest_datagram_of_ipv4():
    assert limits.MAX_DATAGRAM_BYTES == 0xFFFF - 20 - 8
    assert limits.SEGMENT_BYTES + limits.MAX_DATAGRAM_BYTES <= 0xFFFF


def test_a_thousand_clients_at_once_are_within_the_rate_of_flows():
    assert limits.FLOWS_PER_TICK >= 2 * 1000


def test_ten_thousand_streams_at_the_least_window_fit_the_bound_of_a_process():
    assert 10_000 * limits.MIN_WINDOW_BYTES <= 32 << 20


def test_the_numbers_of_the_wire_fit_their_fields():
    for number in (limits.MAX_WINDOW_BYTES, limits.MAX_STREAMS, limits.MAX_LEASE_S, limits.LAST_STREAM_ID):
        assert number <= 0xFFFF_FFFF
