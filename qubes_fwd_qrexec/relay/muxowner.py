# SPDX-License-Identifier: GPL-2.0-or-later
"""What a `Mux` tells whoever made it, who decides what to do about it."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from qubes_fwd_qrexec.mux import GoawayCode, OpenReceived, ResetCode

    from .leg import Leg
    from .mux import Mux


class MuxOwner(Protocol):
    """Who made a mux call; all calls come from the loop's thread."""

    def ready(self, mux: "Mux") -> None:
        """The peer has said HELLO: streams may be opened."""

    def open_requested(self, mux: "Mux", event: "OpenReceived") -> None:
        """The peer asks for a stream; answer with `Mux.accept` or `Mux.refuse`, now or later."""

    def open_abandoned(self, mux: "Mux", stream_id: int) -> None:
        """The peer does not want that stream any more, which was not answered yet."""

    def refused(self, mux: "Mux", leg: "Leg", code: "ResetCode") -> None:
        """The peer will not have that stream; its leg is over and has left its socket open."""

    def draining(self, mux: "Mux", code: "GoawayCode") -> None:
        """The peer takes no more streams."""

    def over(self, mux: "Mux", problem: str | None) -> None:
        """The mux call has ended, as agreed if there is no ``problem``; every leg has been aborted."""
