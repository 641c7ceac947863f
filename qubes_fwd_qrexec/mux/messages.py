# SPDX-License-Identifier: GPL-2.0-or-later
"""The values that frames carry. Each is valid once it exists, and is not checked again.

An invalid value raises LocalProtocolError, since the caller made it; `wire` turns that into
RemoteProtocolError if the value came from the peer.
"""

from dataclasses import dataclass
from enum import Enum, IntEnum

from qubes_fwd_qrexec.common.errors import LocalProtocolError
from qubes_fwd_qrexec.common.values import IPAddress, unmapped

from .limits import MAX_LEASE_S, MAX_STREAMS, MAX_WINDOW_BYTES, MIN_WINDOW_BYTES, VERSION

NONCE_BYTES = 16
PING_BYTES = 8
LAST_PORT = 65_535


class Role(Enum):
    """Which end of the mux this is. Only the listener side opens streams."""

    LISTENER = "listener"
    TARGET = "target"


class ResetCode(IntEnum):
    """Why a stream was reset, or, before ACCEPT, why it was refused."""

    ABORTED = 1
    REFUSED = 2
    TIMEOUT = 3
    UNREACHABLE = 4
    OVER_LIMIT = 5
    LEASE_OVER = 6
    REVOKED = 7
    SHUTDOWN = 8
    INTERNAL = 9


class FlowCode(IntEnum):
    """Why a flow was ended. The numbers are shared with `ResetCode` and `GoawayCode`."""

    REFUSED = 2
    UNREACHABLE = 4
    OVER_LIMIT = 5
    LEASE_OVER = 6
    REVOKED = 7
    SHUTDOWN = 8
    INTERNAL = 9
    DONE = 10


class GoawayCode(IntEnum):
    """Why an end takes no more streams, or why the mux is over. The numbers are shared with `ResetCode`."""

    LEASE_OVER = 6
    REVOKED = 7
    SHUTDOWN = 8
    INTERNAL = 9
    DONE = 10
    IDS_USED_UP = 11
    PROTOCOL_ERROR = 12
    NO_COMMON_VERSION = 13


class ProxyVersion(IntEnum):
    """The header of the PROXY protocol that the target's service sends to the server before anything else."""

    OFF = 0
    V1 = 1
    V2 = 2


REFUSAL_WHILE_DRAINING = {
    GoawayCode.LEASE_OVER: ResetCode.LEASE_OVER,
    GoawayCode.REVOKED: ResetCode.REVOKED,
    GoawayCode.SHUTDOWN: ResetCode.SHUTDOWN,
    GoawayCode.IDS_USED_UP: ResetCode.SHUTDOWN,
}
"""The codes that may begin a drain, and the code that then refuses a stream which comes too late. A flow that
comes too late is ended with the code of the same number."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What each end says about itself before anything else.

    ``window_bytes``: the most credit that this end will have outstanding for one stream; 0 in a datagram
    call, which has no credit. ``max_streams`` and ``lease_s``: how many streams (or flows) the target side
    holds at once, and for how many seconds it takes new ones; both are 0 on the listener side. ``nonce``: 16
    random bytes, to match the logs of both ends. Raises LocalProtocolError for values out of bounds.
    """

    window_bytes: int
    nonce: bytes
    max_streams: int = 0
    lease_s: int = 0
    min_version: int = 1
    max_version: int = VERSION

    def __post_init__(self) -> None:
        _check(1 <= self.min_version <= self.max_version <= 0xFFFF, "versions must be 1 to 65535, in order")
        _check(
            self.is_of_datagrams or MIN_WINDOW_BYTES <= self.window_bytes <= MAX_WINDOW_BYTES,
            f"the window must be {MIN_WINDOW_BYTES} to {MAX_WINDOW_BYTES} bytes, or 0 in a datagram call",
        )
        _check(0 <= self.max_streams <= MAX_STREAMS, f"streams must be 0 to {MAX_STREAMS}")
        _check(0 <= self.lease_s <= MAX_LEASE_S, f"a lease must be 0 to {MAX_LEASE_S} seconds")
        _check(
            (self.max_streams == 0) == (self.lease_s == 0),
            "the target side says streams and lease, the listener side neither",
        )
        _check(len(self.nonce) == NONCE_BYTES, f"a nonce has {NONCE_BYTES} bytes")

    @property
    def is_of_datagrams(self) -> bool:
        """Whether this is the HELLO of a datagram call."""
        return self.window_bytes == 0

    @property
    def role(self) -> Role:
        """The end that says this."""
        return Role.TARGET if self.max_streams else Role.LISTENER


@dataclass(frozen=True, slots=True)
class Origin:
    """Who connected, and to which address and port of the exposed qube.

    An IPv4-mapped IPv6 address becomes IPv4, and a scope (``%eth0``) is dropped, as it means nothing in
    another qube. The target side must not trust any of this: the listener side can claim anything.
    """

    client: IPAddress
    client_port: int
    exposed: IPAddress
    exposed_port: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "client", unmapped(self.client))
        object.__setattr__(self, "exposed", unmapped(self.exposed))
        _check(0 <= self.client_port <= LAST_PORT, "a port must be 0 to 65535")
        _check(0 <= self.exposed_port <= LAST_PORT, "a port must be 0 to 65535")


@dataclass(frozen=True, slots=True)
class Goaway:
    """No stream above ``last_id`` was or will be processed; nothing at all follows a final one."""

    last_id: int
    code: GoawayCode
    is_final: bool

    def __post_init__(self) -> None:
        _check(self.is_final or self.code in REFUSAL_WHILE_DRAINING, f"{self.code.name} cannot begin a drain")


def _check(is_valid: bool, problem: str) -> None:
    if not is_valid:
        raise LocalProtocolError(problem)
