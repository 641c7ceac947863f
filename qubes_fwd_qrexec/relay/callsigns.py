# SPDX-License-Identifier: GPL-2.0-or-later
"""What our service says on stderr about a single call, so that a clean end can be told from a break.

Over raw qrexec an answer that broke off ends just like a complete one, and the exit status that shows the
difference may come late. So the service first says that it will report the end, and then after how many
bytes its server ended cleanly. The listener compares that number: stderr may arrive before the last bytes,
and those may be lost with the call.
"""

from qubes_fwd_qrexec.common.services import FORWARD_SERVICE

GREETING = f"{FORWARD_SERVICE}: a clean end of the server will be told here"
# Enough for everything that a login shell says, and qrexec's buffers hold, before our service begins.
READ_MAX_BYTES = 65536
# Longer than either of the two lines.
_LINE_MAX = 200


def clean_end(sent_bytes: int) -> str:
    """The line saying that the server ended cleanly, after so many bytes for the caller."""
    return f"{FORWARD_SERVICE}: the server ended cleanly after {sent_bytes} bytes"


class Signs:
    """What a call's stderr says about the end of its output, of which ``received_bytes`` came.

    Another qube wrote all of it, or caused it: only exact lines count.
    """

    def __init__(self, received_bytes: int) -> None:
        self.will_tell = False
        """Whether this is a service that reports a clean end."""
        self.is_clean = False
        """Whether the server ended cleanly, and everything that it sent has arrived."""
        self._clean_end = clean_end(received_bytes).encode("ascii")
        self._untrusted_line = b""
        self._left_bytes = READ_MAX_BYTES

    @property
    def left_bytes(self) -> int:
        """How many more bytes to read of it."""
        return self._left_bytes

    def take(self, untrusted_data: bytes) -> None:
        """Take the next piece, of at most `left_bytes`."""
        self._left_bytes -= len(untrusted_data)
        *untrusted_lines, untrusted_rest = (self._untrusted_line + untrusted_data).split(b"\n")
        self._untrusted_line = untrusted_rest[:_LINE_MAX]
        self.will_tell = self.will_tell or GREETING.encode("ascii") in untrusted_lines
        self.is_clean = self.is_clean or self._clean_end in untrusted_lines
