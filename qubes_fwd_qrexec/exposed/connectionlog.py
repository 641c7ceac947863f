# SPDX-License-Identifier: GPL-2.0-or-later
"""The connection log: one line when a connection or flow is let in, one when it ends, in ``key=value`` form.

In the journal each line has fields, too, and ``journalctl FORWARD=work.web`` shows those of one forward.

Clients could flood the log with connections. So the lines per second are limited, and the next line says how
many were left out; the counters count all connections.
"""

import logging
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.values import Proto

_logger = logging.getLogger(__name__)

# journald takes 10,000 lines of a service in 30 s (RateLimitBurst, journald.conf(5)) and drops the rest. This
# stays under a tenth of that, and leaves room for the listener's warnings.
LINES_PER_S = 20.0
BURST = 100


class How(StrEnum):
    """How a connection ended."""

    CLOSED = "closed"
    """A clean end of both directions."""
    CLIENT_RESET = "client-reset"
    TARGET_RESET = "target-reset"
    """An abort, over a mux call."""
    ABORTED = "aborted"
    """An abort, over a call of its own, where nobody tells whose."""
    REFUSED = "refused"
    """There was no call, or no server."""
    CUT = "cut"
    """Its forward has ended."""
    CUT_BY_ADMIN = "cut-by-admin"
    """Somebody has cut it in dom0."""
    MADE_ROOM = "made-room"
    """It was the idlest when there was no room for another one."""
    BUG = "bug"
    """There was a bug in this program."""


class FlowHow(StrEnum):
    """How a flow ended."""

    IDLE = "idle"
    """Nothing has moved in it for too long."""
    REFUSED = "refused"
    """There was no call, or nothing listens on the server's port in the target."""
    TARGET_ENDED = "target-ended"
    """The target has ended it, for any other reason."""
    REVOKED = "revoked"
    """dom0 has ended its call."""
    CUT = "cut"
    """Its forward has ended, or its port is closed."""
    CUT_BY_ADMIN = "cut-by-admin"
    """Somebody has cut it in dom0."""
    MADE_ROOM = "made-room"
    """It was quiet when there was no room for another one, or its call's place was needed."""
    BUG = "bug"
    """There was a bug in this program."""


class Figures(Protocol):
    """What is known of a connection or flow at its end: when it began (`time.monotonic`), and its bytes from
    and to the client."""

    @property
    def since(self) -> float: ...

    @property
    def sent(self) -> int: ...

    @property
    def received(self) -> int: ...


class Opened(NamedTuple):
    """What the first line of a connection said, for its last one.

    ``client_port`` is 0 if the client was gone; ``by``: how it was to be carried.
    """

    client: str
    client_port: int
    port: int
    by: str

    @property
    def text(self) -> str:
        client = f"[{self.client}]" if ":" in self.client else self.client
        port = f":{self.client_port}" if self.client_port else ""
        return f"client={client}{port} port={self.port} {self.by}"


class ConnectionLog:
    """One for all forwards of TCP of a listener, and one for those of UDP, which another thread writes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens = float(BURST)
        self._filled_at = clock()
        self._held_back = 0

    def opened(
        self, config: ListenerConfig, client_name: Callable[[], tuple[Any, ...]], port: int
    ) -> Opened | None:
        """Write the first line. Returns what `ended` needs, or None if the line was left out.

        ``client_name``: as `socket.getpeername`; it may raise OSError.
        """
        if not self._may_write():
            return None
        try:
            client, client_port = client_name()[:2]
        except OSError:
            client, client_port = "gone", 0
        by = "proto=udp" if config.proto is Proto.UDP else f"transport={config.transport}"
        opened = Opened(client, client_port, port, by)
        forward = f"{config.target}.{config.name}"
        self._write(f"connection=open {opened.text} forward={forward}", _fields("open", config, opened))
        return opened

    def ended(
        self, opened: Opened | None, config: ListenerConfig, carried: Figures, how: How | FlowHow
    ) -> None:
        """Write the last line of a connection, if it has a first one.

        A long line is cut at its end, so what the first line has, too, comes last.
        """
        if opened is None or not self._may_write():
            return
        lasted = f"{time.monotonic() - carried.since:.3f}"
        self._write(
            f"connection=end how={how} {opened.text} sent={carried.sent} received={carried.received} "
            f"seconds={lasted} forward={config.target}.{config.name}",
            _fields("end", config, opened)
            | {
                "FORWARD_HOW": str(how),
                "FORWARD_SENT": str(carried.sent),
                "FORWARD_RECEIVED": str(carried.received),
                "FORWARD_SECONDS": lasted,
            },
        )

    def _may_write(self) -> bool:
        now = self._clock()
        self._tokens = min(BURST, self._tokens + (now - self._filled_at) * LINES_PER_S)
        self._filled_at = now
        if self._tokens < 1:
            self._held_back += 1
            return False
        self._tokens -= 1
        return True

    def _write(self, text: str, fields: dict[str, str]) -> None:
        held_back, self._held_back = self._held_back, 0
        left_out = f" held_back={held_back}" if held_back else ""
        _logger.info("%s%s", text, left_out, extra={"fields": fields})


def _fields(event: str, config: ListenerConfig, opened: Opened) -> dict[str, str]:
    """What both lines have in the journal.

    It finds whole values only, so the client's address and its port are two fields.
    """
    fields = {
        "FORWARD": f"{config.target}.{config.name}",
        "FORWARD_EVENT": event,
        "FORWARD_PROTO": str(config.proto),
        "FORWARD_PORT": str(opened.port),
        "FORWARD_CLIENT": opened.client,
    }
    return fields | ({"FORWARD_CLIENT_PORT": str(opened.client_port)} if opened.client_port else {})
