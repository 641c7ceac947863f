# SPDX-License-Identifier: GPL-2.0-or-later
import sys
from collections import deque

from qubes_fwd_qrexec.mux import DataReceived
from qubes_fwd_qrexec.mux.limits import FRAME_COST_BYTES


def test_an_event_has_the_credit_it_used():
    assert DataReceived(1, b"abc").cost == 3 + FRAME_COST_BYTES


def test_a_payload_occupies_no_more_than_it_costs():
    few, many = deque([bytes(1)] * 64), deque([bytes(1)] * 6464)
    place = (sys.getsizeof(many) - sys.getsizeof(few)) / 6400
    for size in (2, 100, 32768):
        event = DataReceived(1, bytes(size))
        assert sys.getsizeof(event.data) + place <= event.cost
