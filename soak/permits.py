# SPDX-License-Identifier: GPL-2.0-or-later
"""When packets of one kind may pass: what a rule allows, and for how long after its end they still may."""

from dataclasses import dataclass


@dataclass(slots=True)
class _Span:
    begun: float
    closed: float
    over: float


class Permit:
    """For one kind of packets. Times are in seconds, of one clock."""

    def __init__(self, grace_s: float) -> None:
        """``grace_s``: how long packets may still pass after a rule's end, if nobody says it is closed."""
        self._grace_s = grace_s
        self._spans: list[_Span] = []

    @property
    def is_open(self) -> bool:
        """Whether a rule that never ends allows them now."""
        return bool(self._spans) and self._spans[-1].closed == float("inf")

    def allows(self, now: float) -> bool:
        """Whether a rule allows them at this moment."""
        return any(span.begun <= now < span.closed for span in self._spans)

    def open(self, now: float, until: float = float("inf")) -> None:
        """They may pass from now on, until a time if that is given."""
        self.close(now)
        self._spans.append(_Span(now, until, until + self._grace_s))

    def close(self, now: float) -> None:
        """No rule allows them any more."""
        for span in self._spans:
            if span.closed > now:
                span.closed, span.over = now, now + self._grace_s

    def confirm(self, asked: float, now: float) -> None:
        """What was closed when somebody asked is closed now."""
        for span in self._spans:
            if span.closed <= asked:
                span.over = min(span.over, now)

    def forget(self, before: float) -> None:
        """What has passed since will not be judged by what was over before."""
        self._spans = [span for span in self._spans if span.over >= before]

    def late_s(self, sent: float, received: float) -> float:
        """How much too late a packet was sent that has passed; 0 if it might pass on its way."""
        return min(
            (max(0.0, sent - span.over) for span in self._spans if span.begun <= received),
            default=float("inf"),
        )
