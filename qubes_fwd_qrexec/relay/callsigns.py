# SPDX-License-Identifier: GPL-2.0-or-later
"""What our service says on stderr about a single call, so that the listener can tell an end from a break.

Over raw qrexec an answer that broke off ends just as a whole one does, and the exit status that tells may
come late. So the service says first that it will tell, and then after how many bytes its server ended
cleanly. The number is compared: stderr may arrive before the last bytes, which may be lost with the call.
"""

from qubes_fwd_qrexec.common.services import FORWARD_SERVICE

GREETING = f"{FORWARD_SERVICE}: a clean end of the server will be told here"
# Enough for all that qrexec's buffers hold of a login shell's complaints before our service has begun.
READ_MAX_BYTES = 65536
# Longer than either of the two lines.
_LINE_MAX = 200


def clean_end(sent_bytes: int) -> str:
    """The line that says that the server ended cleanly, and that the caller gets so many bytes of it."""
    return f"{FORWARD_SERVICE}: the server ended cleanly after {sent_bytes} bytes"


class Signs:
    """What a call's stderr has told by the end of its output, which came after ``received_bytes``.

    All of it was written by another qube, or on its behalf: only exact lines count.
    """

    def __init__(self, received_bytes: int) -> None:
        self.will_tell = False
        """Whether this is a service that tells of a clean end."""
        self.is_clean = False
        """Whether the server ended cleanly, and all that it sent has arrived."""
        self._clean_end = clean_end(received_bytes).encode("ascii")
        self._untrusted_line = b""
        self._left_bytes = READ_MAX_BYTES

    @property
    def left_bytes(self) -> int:
        """How much more of it is read."""
        return self._left_bytes

    def take(self, untrusted_data: bytes) -> None:
        """The next of it, of at most `left_bytes`."""
        self._left_bytes -= len(untrusted_data)
        *untrusted_lines, untrusted_rest = (self._untrusted_line + untrusted_data).split(b"\n")
        self._untrusted_line = untrusted_rest[:_LINE_MAX]
        self.will_tell = self.will_tell or GREETING.encode("ascii") in untrusted_lines
        self.is_clean = self.is_clean or self._clean_end in untrusted_lines
