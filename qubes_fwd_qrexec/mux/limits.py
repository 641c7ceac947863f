# SPDX-License-Identifier: GPL-2.0-or-later
"""Every bound of the mux protocol, and where its number comes from.

Bounds that both ends must agree on are part of the wire format (SPEC.md has them too); the others protect
this end alone.
"""

from typing import Final

VERSION: Final = 2
"""The latest version of the protocol. Version 1 is spoken too: it has no first bytes in OPEN."""

HEADER_BYTES: Final = 8
"""Type, flags, length and stream; see SPEC.md, "Frames"."""

MAX_DATA_BYTES: Final = 32_768
"""The largest payload of a DATA frame. At 90 MiB/s, which socat reaches over qrexec, one frame holds up the
others for 0.35 ms, and its 72 bytes of header and cost are a fifth of a percent."""

MAX_DATAGRAM_BYTES: Final = 65_507
"""The longest datagram of UDP over IPv4: 65535 less the headers of IP and UDP. It is also the most that all
datagrams of one frame have together, since the kernel takes no more from one system call (UDP_SEGMENT)."""

MAX_SEGMENTS: Final = 64
"""The most datagrams in one frame: UDP_MAX_SEGMENTS of kernels before 6.9, which is also the most that
UDP_GRO puts together."""

SEGMENT_BYTES: Final = 2
"""The field in front of the datagrams of a frame; see SPEC.md, "Datagram calls"."""

MAX_HELLO_BYTES: Final = 256
"""A HELLO of a later version may be longer than ours, but never longer than this."""

FRAME_COST_BYTES: Final = 64
"""What a DATA frame costs in credit beside its payload: the memory that a received payload takes here beside
its bytes, which is 33 for a bytes object and 24 to 40 for its place in an event or a queue. Without it, a
peer that spends its credit on frames of one byte could make us hold more than we granted."""

MIN_CREDIT_BYTES: Final = 1_024
"""The least that a CREDIT frame may carry. So a peer can send at most one CREDIT frame for each KiB that it
received, and no keystroke is answered with a frame of its own."""

MIN_WINDOW_BYTES: Final = 2_048
"""The least initial credit apart from 0. With less than MIN_CREDIT_BYTES + FRAME_COST_BYTES a stream can stop
for good: too little left to send a frame, too little consumed to send a CREDIT."""

MAX_FIRST_BYTES: Final = MIN_WINDOW_BYTES - FRAME_COST_BYTES
"""The most that OPEN may carry of a stream. Any initial credit but 0 covers it, and it holds a TLS greeting
with post-quantum keys, or a small request of HTTP."""

MAX_WINDOW_BYTES: Final = 1 << 24
"""The most credit that may be outstanding for one stream: 16 MiB last over 150 ms at 100 MiB/s, far more than
a call between two qubes of one machine needs."""

MAX_STREAMS: Final = 65_536
"""The most streams that one mux may hold: more connections than one target address has ports for."""

MAX_LEASE_S: Final = 86_400
"""The longest lease in seconds: dom0's policy is evaluated again at least once a day."""

LAST_STREAM_ID: Final = 0xFFFF_FFFF
"""The last id that fits the header. At 1,000 streams a second it is reached after 49 days."""

RAPID_RESETS_PER_TICK: Final = 1_000
"""Of the streams that the listener side opened and reset within one tick (a second), so many are answered per
tick; the others hold their slots until a later one. It is more than honest clients of a LAN need, and a sixth
of a core at the measured 0.15 ms for a connection on loopback."""

FLOWS_PER_TICK: Final = 4_000
"""So many new flows the target side takes per tick (a second); those beyond are ended at once. Each takes a
socket there, a quarter of a core in all at 60 us for one. It is more than 1,000 DNS queries at once, each
from a port of its own."""

CONTROL_BYTES: Final = 65_536
"""How many bytes of frames other than DATA and DATAGRAMS may be queued, for any number of streams or flows:
the size of a pipe."""

CONTROL_BYTES_PER_STREAM: Final = 104
"""How many bytes may be queued in addition for each stream: an OPEN (51) or an ACCEPT (12), a RESET, a RECALL
and a RETURN (12 each), and one CREDIT (12) to spare. A peer that reads never makes us queue more; see
SPEC.md, "Limits and abuse"."""

CONTROL_BYTES_PER_FLOW: Final = 64
"""How many bytes may be queued in addition for each flow: a FLOW (47) and an END (12), and 5 to spare."""

COPY_BYTES: Final = 4_096
"""Payloads up to this size are copied behind their header, larger ones are queued by reference. Measured with
a socket pair: at 4 KiB, copying and sending takes as long as sendmsg of two parts (4.3 us), at 16 KiB a
quarter longer."""
