# SPDX-License-Identifier: GPL-2.0-or-later
"""What a `Leg` needs of the mux call that carries its stream."""

from typing import Protocol

from qubes_fwd_qrexec.mux import Connection, ResetCode

from .backlog import Backlog
from .budget import Share
from .loop import Loop


class LegOwner(Protocol):
    """The mux call that a leg belongs to; a leg calls it from the loop's thread alone."""

    loop: Loop
    share: Share
    connection: Connection
    backlog: Backlog
    payload_buffer: memoryview
    """Where a leg puts a payload for `send_now`; also room for bytes that nobody wants."""

    def payload_buffers(self, limit: int) -> list[memoryview]:
        """Where a leg puts ``limit`` bytes for `send_now` that may be several payloads."""

    def send_data(self, stream_id: int, data: bytes) -> None:
        """Queue ``data``, of at most `Backlog.room` bytes."""

    def send_now(self, stream_id: int, length: int) -> None:
        """Send the first ``length`` bytes in ``payload_buffer`` or `payload_buffers`."""

    def send_eof(self, stream_id: int) -> None:
        """Queue EOF: the local peer sends nothing more."""

    def reset(self, stream_id: int, code: ResetCode) -> None:
        """Queue RESET: the stream ends at once."""

    def grant(self, stream_id: int, credit: int) -> None:
        """Let the other end send ``credit`` bytes more."""

    def forget(self, stream_id: int) -> None:
        """The leg of that stream has closed."""
