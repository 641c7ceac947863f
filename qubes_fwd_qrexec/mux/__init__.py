# SPDX-License-Identifier: GPL-2.0-or-later
"""The mux protocol: many TCP streams, or many flows of UDP datagrams, in one qrexec call. SPEC.md describes
the wire.

Pure: no I/O, no clock, no trio, no randomness. `Connection` is one end of a call with streams,
`FlowConnection` one of a datagram call; events come out of `receive_data`, bytes out of `data_to_send`. The
only exceptions that leave this package are RemoteProtocolError (the peer's fault, which ends the mux) and
LocalProtocolError (the caller's bug).
"""

from .connection import Connection
from .events import (
    AcceptReceived,
    CreditReceived,
    CreditReturned,
    DatagramsReceived,
    DataReceived,
    EofReceived,
    Event,
    FlowEnded,
    FlowEvent,
    FlowRequested,
    GoawayReceived,
    HelloReceived,
    LostReported,
    OpenReceived,
    PongReceived,
    ResetReceived,
)
from .flows import FlowConnection
from .limits import (
    FLOWS_PER_TICK,
    FRAME_COST_BYTES,
    HEADER_BYTES,
    MAX_DATA_BYTES,
    MAX_DATAGRAM_BYTES,
    MAX_SEGMENTS,
    MAX_WINDOW_BYTES,
    MIN_CREDIT_BYTES,
    MIN_WINDOW_BYTES,
)
from .messages import FlowCode, Goaway, GoawayCode, Hello, Origin, ProxyVersion, ResetCode, Role
from .wire import Buffer

__all__ = [
    "FLOWS_PER_TICK",
    "FRAME_COST_BYTES",
    "HEADER_BYTES",
    "MAX_DATAGRAM_BYTES",
    "MAX_DATA_BYTES",
    "MAX_SEGMENTS",
    "MAX_WINDOW_BYTES",
    "MIN_CREDIT_BYTES",
    "MIN_WINDOW_BYTES",
    "AcceptReceived",
    "Buffer",
    "Connection",
    "CreditReceived",
    "CreditReturned",
    "DataReceived",
    "DatagramsReceived",
    "EofReceived",
    "Event",
    "FlowCode",
    "FlowConnection",
    "FlowEnded",
    "FlowEvent",
    "FlowRequested",
    "Goaway",
    "GoawayCode",
    "GoawayReceived",
    "Hello",
    "HelloReceived",
    "LostReported",
    "OpenReceived",
    "Origin",
    "PongReceived",
    "ProxyVersion",
    "ResetCode",
    "ResetReceived",
    "Role",
]
