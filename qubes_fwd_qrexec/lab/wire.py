# SPDX-License-Identifier: GPL-2.0-or-later
"""What the client stand-in and the broker say to each other over an agent socket.

The socket is SOCK_SEQPACKET: a message is one packet. The client sends one `Call` and, with it, the
descriptors that the call joins; the broker answers with `CONNECTED` or `NO_VCHAN`, any number of `STDERR`,
and at last `EXIT`. An end before the first means refused, as on the real agent's socket; an end after
`CONNECTED`, a lost vchan.

Imports nothing: the client's start-up time is part of every call.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

# The first byte of the broker's messages.
CONNECTED = b"c"
NO_VCHAN = b"n"
STDERR = b"e"
EXIT = b"x"

# As much stderr in one message as qrexec has in one chunk (libqrexec/qrexec.h, MAX_DATA_CHUNK_V3).
STDERR_MAX = 65536
# Longer than any request: a service of 65,000 bytes (MAX_SERVICE_NAME_LEN) and as much prefix data as one
# argument of a program may have (128 KiB on Linux, MAX_ARG_STRLEN).
CALL_MAX = 262144
# The vchan's, each way, unless the caller asks for another (agent/qrexec-agent-data.c, VCHAN_BUFFER_SIZE).
BUFFER_SIZE = 65536
_SIZE_DIGITS_MAX = 10

# qubes-core-qrexec agent/qrexec-agent-data.c, handle_data_client(), and libqrexec/qrexec.h.
EXIT_NO_VCHAN = 1
EXIT_PROBLEM = 125
EXIT_REFUSED = 126
EXIT_NOT_FOUND = 127
# qrexec_process_io() returns -1 when the vchan is lost before the remote exit status.
EXIT_LOST = 255


class Call:
    """A request; all of it is as the caller wrote it, and unchecked."""

    __slots__ = ("buffer_size", "prefix", "service", "source", "target")

    def __init__(
        self, target: str, service: str, source: str, prefix: bytes, buffer_size: int = BUFFER_SIZE
    ) -> None:
        self.target = target
        self.service = service
        self.source = source
        self.prefix = prefix
        self.buffer_size = buffer_size

    def encode(self) -> bytes:
        """No part but the last may hold NUL, which no argument of a program can."""
        texts = (self.target, self.service, self.source, str(self.buffer_size))
        return b"\0".join([*(text.encode("utf-8", "surrogateescape") for text in texts), self.prefix])

    @classmethod
    def decode(cls, untrusted_packet: bytes) -> "Self":
        """Raises ValueError for what `encode` cannot have made."""
        target, service, source, untrusted_size, prefix = untrusted_packet.split(b"\0", 4)
        return cls(_text(target), _text(service), _text(source), prefix, _size(untrusted_size))


def _text(untrusted_text: bytes) -> str:
    return untrusted_text.decode("utf-8", "surrogateescape")


def _size(untrusted_size: bytes) -> int:
    if not untrusted_size.isdigit() or len(untrusted_size) > _SIZE_DIGITS_MAX:
        raise ValueError("the buffer size is no number")
    return int(untrusted_size)


def encode_exit(status: int) -> bytes:
    return EXIT + b"%d" % status


def decode_exit(packet: bytes) -> int:
    return int(packet[1:])
