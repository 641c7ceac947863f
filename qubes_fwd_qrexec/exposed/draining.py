# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwards that are over and whose connections may finish: what still flows, and until when at most."""

import time

from qubes_fwd_qrexec.common.report import DrainingReport

from .forward import DRAIN_MAX_S, OpenForward


class Draining:
    """Closed forwards with connections, each with the time at which these are cut."""

    def __init__(self) -> None:
        self._deadlines: dict[OpenForward, float] = {}

    def add(self, forward: OpenForward) -> None:
        """A forward that has just been closed."""
        if forward.connections:
            self._deadlines[forward] = time.monotonic() + DRAIN_MAX_S

    def look(self) -> None:
        """Forget those that have finished, and cut what has had its time."""
        now = time.monotonic()
        for forward, deadline in list(self._deadlines.items()):
            if now >= deadline:
                forward.cut()
            if not forward.connections:
                del self._deadlines[forward]

    def report(self) -> tuple[DrainingReport, ...]:
        """Those that have connections still, in the order in which they were closed."""
        now = time.monotonic()
        return tuple(
            DrainingReport(
                target=forward.config.target,
                name=forward.config.name,
                connections=forward.connections,
                left_s=max(0, int(deadline - now)),
            )
            for forward, deadline in self._deadlines.items()
            if forward.connections
        )
