# SPDX-License-Identifier: GPL-2.0-or-later
"""The target's end of a mux call, whatever it carries: its lease, and what dom0 says of it.

The call's argument fixes the ports. The lease is kept here, whatever the other end thinks. It begins when
dom0 allows this call, and begins anew when dom0 allows another call of the same caller for the same ports.
Once it is over, the service takes nothing new and cuts what it carries. So what dom0 no longer allows is over
within the lease, even if no revocation arrives. Only if dom0 has said that the mux call may drain does what
it carries go on, up to the deadline for that.

On SIGUSR1 it looks at the new list of what dom0 allows (`revocation`). On SIGUSR2 it takes nothing new. On
SIGTERM it ends everything now.

`muxservice` carries streams, `udpservice` flows.
"""

import contextlib
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Protocol

from qubes_fwd_qrexec.common.allowance import Calls
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.mux import GoawayCode
from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.system.bugs import Bugs
from qubes_fwd_qrexec.system.bugs import leave as leave_bug
from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit

from .callnotes import Kind, directory
from .callstart import CallStart
from .localserver import ServiceError
from .permissionwatch import PermissionLike, PermissionWatch, called_on_signals
from .revocation import LOOK, RevokedError, allowed_s, permitted

# How long dom0's answer holds (docs/behaviours.md, 53).
LEASE_S = 300
TAKE_NO_MORE = signal.SIGUSR2
# How often a draining mux call checks whether dom0 still lets it drain.
_LOOK_AT_DRAIN_S = 30.0


class Lease:
    """Holds for ``length_s`` seconds from when dom0 last allowed the call (``said_s``, `time.monotonic`)."""

    def __init__(self, length_s: int, said_s: Callable[[], float]) -> None:
        self.length_s = length_s
        self._said_s = said_s

    @property
    def left_s(self) -> float:
        return self._said_s() + self.length_s - time.monotonic()


class AnyMux(Protocol):
    """The mux of a call, whatever it carries; see `relay.muxbase.MuxBase`."""

    def drain(self, code: GoawayCode) -> None: ...

    def close(self, code: GoawayCode = ...) -> None: ...

    def fail(self) -> None: ...


class _Hears:
    """What the owner of a mux hears, and has nothing to do about at this end."""

    def ready(self) -> None:
        """The other end begins streams and flows."""

    def draining(self, code: GoawayCode) -> None:
        """The mux closes by itself after the last stream or flow."""


class CallService(_Hears, ABC):
    """One mux call, from its first byte to its last; ``permission`` is what dom0 says of it.

    ``is_over``: nothing new can come any more; connections that are there may still write their last bytes.
    ``problem`` is why, unless that was agreed.
    """

    def __init__(self, lease: Lease, permission: PermissionLike, loop: Loop, mux: AnyMux) -> None:
        self.lease = lease
        self.loop = loop
        self.is_over = False
        self.problem: str | None = None
        self._mux = mux
        self._watch = PermissionWatch(loop, permission, self.revoke, self.take_no_more, end=mux.fail)
        loop.after(lease.left_s, self._look_at_lease, mux.fail)

    @property
    @abstractmethod
    def carries_any(self) -> bool:
        """Whether there are connections or flows, or some that are about to be."""

    @abstractmethod
    def _let_go(self) -> None:
        """Let go of what does not end with the mux."""

    def run(self) -> str | None:
        """Serve until the mux call and its last connection or flow are over.

        Returns why it ended, or None if it ended as agreed.
        """
        meanings = {
            LOOK: self.look,
            TAKE_NO_MORE: self.take_no_more,
            signal.SIGTERM: self.revoke,
        }
        with called_on_signals(self.loop, meanings, self._mux.fail):
            self.look()  # dom0 may have said something before the signals had handlers
            while not self.is_over or self.carries_any:
                self.loop.run_once()
        return self.problem

    def close(self) -> None:
        """Let go of what `run` has left, which is nothing where it returned."""
        self._let_go()
        self.loop.close()

    def look(self) -> None:
        """Do as dom0 says now."""
        self._watch.look()

    def take_no_more(self) -> None:
        """Refuse what is new from now on, and end with the last connection or flow there is."""
        if not self.is_over:
            self._mux.drain(GoawayCode.LEASE_OVER)

    def revoke(self) -> None:
        """dom0 does not allow it any more: end everything."""
        self._cut(GoawayCode.REVOKED)

    def _look_at_lease(self) -> None:
        """End the mux call if its lease is over, unless dom0 lets it drain."""
        left_s = self.lease.left_s
        if self._watch.drains:
            left_s = max(left_s, _LOOK_AT_DRAIN_S)  # until its deadline, or until dom0 decides otherwise
        if left_s > 0:
            self.loop.after(left_s, self._look_at_lease, self._mux.fail)
        else:
            self.take_no_more()
            if self.carries_any:
                self._cut(GoawayCode.LEASE_OVER)

    def _cut(self, code: GoawayCode) -> None:
        self._let_go()
        self._mux.close(code)  # even if it is over: connections may still have last bytes to write

    # As the owner of the mux; see `_Hears`

    def over(self, problem: str | None) -> None:
        self.is_over = True
        self.problem = problem
        self._let_go()


def serve_call(
    kind: Kind,
    calls: Calls,
    start: CallStart,
    make: Callable[[Lease, PermissionLike, Bugs], CallService],
) -> int:
    """Serve a mux call until it is over. Returns the exit status.

    Raises `ServiceError`, and `RevocationError` if dom0 no longer allows the call or could not end it.
    """
    raise_descriptor_limit()
    place = directory()
    with permitted(kind, calls, start, place) as permission:
        lease = Lease(LEASE_S, lambda: max(start.monotonic_s, allowed_s(calls, place)))
        if lease.left_s <= 0:
            raise RevokedError(f"{calls}: dom0 allowed this call more than {LEASE_S} s ago")
        service = make(lease, permission, Bugs(partial(leave_bug, place)))
        with contextlib.closing(service):
            problem = service.run()
    if problem is not None:
        raise ServiceError(ExitStatus.TROUBLE, problem)
    return os.EX_OK
