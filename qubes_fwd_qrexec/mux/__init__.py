# SPDX-License-Identifier: GPL-2.0-or-later
"""The mux protocol: many TCP streams in one qrexec call. SPEC.md describes the wire.

Pure: no I/O, no clock, no trio, no randomness. `Connection` is one end; events come out of
`receive_data`, bytes out of `data_to_send`. The only exceptions that leave this package are
RemoteProtocolError (the peer's fault, which ends the mux) and LocalProtocolError (the caller's bug).
"""

from .connection import Connection
from .events import (
    AcceptReceived,
    CreditReceived,
    CreditReturned,
    DataReceived,
    EofReceived,
    Event,
    GoawayReceived,
    HelloReceived,
    OpenReceived,
    PongReceived,
    ResetReceived,
)
from .limits import (
    FRAME_COST_BYTES,
    HEADER_BYTES,
    MAX_DATA_BYTES,
    MAX_WINDOW_BYTES,
    MIN_CREDIT_BYTES,
    MIN_WINDOW_BYTES,
)
from .messages import Goaway, GoawayCode, Hello, Origin, ProxyVersion, ResetCode, Role
from .wire import Buffer

__all__ = [
    "FRAME_COST_BYTES",
    "HEADER_BYTES",
    "MAX_DATA_BYTES",
    "MAX_WINDOW_BYTES",
    "MIN_CREDIT_BYTES",
    "MIN_WINDOW_BYTES",
    "AcceptReceived",
    "Buffer",
    "Connection",
    "CreditReceived",
    "CreditReturned",
    "DataReceived",
    "EofReceived",
    "Event",
    "Goaway",
    "GoawayCode",
    "GoawayReceived",
    "Hello",
    "HelloReceived",
    "OpenReceived",
    "Origin",
    "PongReceived",
    "ProxyVersion",
    "ResetCode",
    "ResetReceived",
    "Role",
]
