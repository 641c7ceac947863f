# SPDX-License-Identifier: GPL-2.0-or-later
from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.exposed.counters import Carried, Counters


class Moves:
    moved_at = 7.0
    is_joined = True

    def __init__(self, sent: int, received: int) -> None:
        self.sent = sent
        self.received = received


def test_a_connection_has_the_bytes_of_what_carries_it_and_they_are_kept_when_it_ends() -> None:
    counters = Counters()
    first, second = Carried(5.0), Carried(5.0)
    assert (first.sent, first.received) == (0, 0)
    first.by, second.by = Moves(1, 10), Moves(2, 20)
    assert (first.moved_at, first.sent, first.received) == (7.0, 1, 10)
    counters.closed(first)
    first.by = Moves(1000, 1000)  # whatever it does afterwards
    assert (counters.sent, counters.received) == (1, 10)
    counters.closed(second)
    assert (counters.sent, counters.received) == (3, 30)


class Changing(Carried):
    """One that another thread takes from its call just after each look at what carries it."""

    @property
    def by(self) -> Moves | None:  # type: ignore[override]
        self.left, by = None, self.left
        return by

    @by.setter
    def by(self, by: Moves | None) -> None:
        self.left = by


def test_figures_are_read_while_another_thread_takes_the_connection_from_its_call() -> None:
    for figure, known in {"sent": 1, "received": 10, "moved_at": 7.0, "is_joined": True}.items():
        carried = Changing(5.0)
        carried.by = Moves(1, 10)
        assert getattr(carried, figure) == known


def test_a_connection_that_was_never_carried_has_no_bytes() -> None:
    counters = Counters()
    carried = Carried(5.0)
    assert carried.moved_at == 5.0
    counters.closed(carried)
    assert (counters.sent, counters.received) == (0, 0)


def test_refusals_are_counted_by_reason_and_an_error_has_its_time() -> None:
    now = [1000.0]
    counters = Counters(lambda: now[0])
    for reason in ("srchosts", Refusal.POLICY, "srchosts", "per-source"):
        counters.refused(reason)
    now[0] = 1005.0
    counters.failed("no call")
    assert counters.refusals == {"srchosts": 2, "policy": 1, "per-source": 1}
    assert (counters.since, counters.last_error) == (1000.0, ("no call", 1005.0))
