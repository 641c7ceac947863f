# SPDX-License-Identifier: GPL-2.0-or-later
"""What the client stand-in and the broker say to each other over an agent socket.

The socket is SOCK_SEQPACKET: a message is one packet. The client sends one `Call` and, with it, the
descriptors that the call joins; the broker answers with `CONNECTED`, any number of `STDERR`, and at last
`EXIT`. An end before `CONNECTED` means refused, as on the real agent's socket; an end after it, a lost vchan.

Imports nothing: the client's start-up time is part of every call.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

# The first byte of the broker's messages.
CONNECTED = b"c"
STDERR = b"e"
EXIT = b"x"

# As much stderr in one message as qrexec has in one chunk (libqrexec/qrexec.h, MAX_DATA_CHUNK_V3).
STDERR_MAX = 65536
# Longer than any request: a service of 65,000 bytes (MAX_SERVICE_NAME_LEN) and as much prefix data as one
# argument of a program may have (128 KiB on Linux, MAX_ARG_STRLEN).
CALL_MAX = 262144

# qubes-core-qrexec libqrexec/qrexec.h.
EXIT_PROBLEM = 125
EXIT_REFUSED = 126
EXIT_NOT_FOUND = 127
# qrexec_process_io() returns -1 when the vchan is lost before the remote exit status.
EXIT_LOST = 255


class Call:
    """A request; all of it is as the caller wrote it, and unchecked."""

    __slots__ = ("prefix", "service", "source", "target")

    def __init__(self, target: str, service: str, source: str, prefix: bytes) -> None:
        self.target = target
        self.service = service
        self.source = source
        self.prefix = prefix

    def encode(self) -> bytes:
        """No part but the last may hold NUL, which no argument of a program can."""
        texts = (self.target, self.service, self.source)
        return b"\0".join([*(text.encode("utf-8", "surrogateescape") for text in texts), self.prefix])

    @classmethod
    def decode(cls, untrusted_packet: bytes) -> "Self":
        """Raises ValueError for what `encode` cannot have made."""
        *untrusted_texts, prefix = untrusted_packet.split(b"\0", 3)
        target, service, source = (text.decode("utf-8", "surrogateescape") for text in untrusted_texts)
        return cls(target, service, source, prefix)


def encode_exit(status: int) -> bytes:
    return EXIT + b"%d" % status


def decode_exit(packet: bytes) -> int:
    return int(packet[1:])
