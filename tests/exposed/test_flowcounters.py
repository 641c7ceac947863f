# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of a forward of UDP."""

from qubes_fwd_qrexec.common.document import Reader
from qubes_fwd_qrexec.exposed.flowcounters import Dropped, FlowCounters

# The largest number in a LOST of the mux protocol.
LOST_MAX = (1 << 64) - 1


def test_a_target_that_lies_about_what_it_dropped_makes_no_report_unreadable() -> None:
    """dom0 would have no figures of any forward of this exposed qube."""
    counters = FlowCounters()
    for _ in range(3):
        counters.dropped(Dropped.TARGET, 2 * LOST_MAX)
    counters.dropped(Dropped.OLD, 5)
    drops = {str(reason): number for reason, number in counters.drops.items()}
    read = Reader({"dropped": drops}, "a report").counts("dropped")
    assert read == {"target": (1 << 63) - 1, "old": 5}
