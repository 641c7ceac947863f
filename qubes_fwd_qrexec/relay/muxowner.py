# SPDX-License-Identifier: GPL-2.0-or-later
"""What a `Mux` tells its owner, which decides what to do about it."""

from typing import Protocol

from qubes_fwd_qrexec.mux import GoawayCode, OpenReceived, ResetCode

from .leg import Leg


class CallOwner(Protocol):
    """The maker of one mux, whatever it carries, which is called from the loop's thread alone."""

    def ready(self) -> None:
        """The peer has said HELLO: streams or flows may be opened."""

    def draining(self, code: GoawayCode) -> None:
        """The peer takes no more streams or flows."""

    def over(self, problem: str | None) -> None:
        """The mux call has ended, and all that it carried; ``problem`` is None if it ended as agreed."""


class MuxOwner(CallOwner, Protocol):
    """The maker of one `Mux`."""

    def open_requested(self, event: OpenReceived) -> None:
        """The peer asks for a stream; answer with `Mux.accept` or `Mux.refuse`, now or later."""

    def open_abandoned(self, stream_id: int) -> None:
        """The peer no longer wants a stream that has not been answered yet."""

    def refused(self, leg: Leg, code: ResetCode) -> None:
        """The peer refused the stream. Its leg is over and has left its socket open."""
