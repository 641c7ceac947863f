# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwards that have ended and whose connections may finish: which ones, and until when."""

import time

from qubes_fwd_qrexec.common.report import DrainingReport
from qubes_fwd_qrexec.common.rules import OnExpire

from .forward import DRAIN_MAX_S, OpenForward
from .udpforward import OpenUdpForward

AnyForward = OpenForward | OpenUdpForward


class Draining:
    """Closed forwards that still have connections, and when those are cut."""

    def __init__(self) -> None:
        self._deadlines: dict[AnyForward, float] = {}

    def add(self, forward: AnyForward) -> None:
        """Take a forward that was just closed."""
        if forward.connections:
            left_s = DRAIN_MAX_S if forward.config.on_expire is OnExpire.DRAIN else 0.0
            self._deadlines[forward] = time.monotonic() + left_s

    @property
    def forwards(self) -> tuple[AnyForward, ...]:
        """Those that still have connections, or had some at the last look."""
        return tuple(self._deadlines)

    @property
    def is_cutting(self) -> bool:
        """Whether connections that were cut have not ended yet."""
        now = time.monotonic()
        return any(forward.connections and now >= at for forward, at in self._deadlines.items())

    def look(self) -> None:
        """Forget forwards that have finished, and cut those whose time is over."""
        now = time.monotonic()
        for forward, deadline in list(self._deadlines.items()):
            if now >= deadline:
                forward.cut()
            if not forward.connections:
                del self._deadlines[forward]

    def report(self) -> tuple[DrainingReport, ...]:
        """The forwards that still have connections, in the order in which they were closed."""
        now = time.monotonic()
        return tuple(
            DrainingReport(
                target=forward.config.target,
                name=forward.config.name,
                connections=forward.connections,
                left_s=max(0, int(deadline - now)),
                proto=forward.config.proto,
            )
            for forward, deadline in self._deadlines.items()
            if forward.connections
        )
