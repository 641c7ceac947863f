# SPDX-License-Identifier: GPL-2.0-or-later
"""The exit statuses of a qrexec call, and what they mean."""

from enum import IntEnum

from .refusals import Refusal


class ExitStatus(IntEnum):
    """The exit statuses with a meaning; the first four are qrexec's (libqrexec/qrexec.h)."""

    NO_ROOM = 1
    """From qrexec-client-vm itself, before the call is through: most likely no memory for its vchan, or
    the target has not taken it (docs/facts.md, Q3)."""
    TROUBLE = 125
    """No connection to the target, or with qubes.ConnectTCP no connection from it to its server."""
    REFUSED = 126
    """Refused by dom0's policy, or no resources for another call."""
    NO_SERVICE = 127
    """The target has no such service."""
    BAD_ARGUMENT = 2
    """Our service does not serve what the call's argument asks for."""
    SERVER_REFUSED = 69
    """Our service could not connect to the server in the target (EX_UNAVAILABLE of sysexits.h)."""
    SERVER_RESET = 74
    """The server aborted the connection (EX_IOERR)."""
    SERVER_TIMEOUT = 75
    """The server did not accept the connection in time (EX_TEMPFAIL)."""
    REVOKED = 77
    """dom0 no longer allows the call (EX_NOPERM)."""


_MEANINGS = {
    ExitStatus.NO_ROOM: "this qube has no room for another vchan (parameter limit of xen-gntalloc allows "
    "more), or the target did not take the call",
    ExitStatus.TROUBLE: "the call failed: the target cannot be reached, or nothing listens on its port",
    ExitStatus.REFUSED: "dom0's policy refuses the call, or there are too many",
    ExitStatus.NO_SERVICE: "the target does not have the service",
    ExitStatus.BAD_ARGUMENT: "the target's service does not understand the call, and may be older",
    ExitStatus.SERVER_REFUSED: "the server in the target refused the connection",
    ExitStatus.SERVER_RESET: "the server in the target aborted the connection",
    ExitStatus.SERVER_TIMEOUT: "the server in the target did not accept the connection in time",
    ExitStatus.REVOKED: "dom0 no longer allows the call",
}


_REFUSALS: dict[int, Refusal] = {
    ExitStatus.NO_ROOM: Refusal.BUSY,
    ExitStatus.REFUSED: Refusal.POLICY,
    ExitStatus.REVOKED: Refusal.POLICY,
    ExitStatus.NO_SERVICE: Refusal.NO_SERVICE,
    ExitStatus.SERVER_REFUSED: Refusal.SERVER,
    ExitStatus.SERVER_TIMEOUT: Refusal.SERVER,
}


def refusal(status: int | None) -> Refusal:
    """What a call counts as from which no byte came; after that a target could have forged the status."""
    return Refusal.NO_CALL if status is None else _REFUSALS.get(status, Refusal.NO_CALL)


def meaning(status: int, *, is_through: bool = False) -> str:
    """The meaning of an exit status, in words for the log. Once connected, a target can forge any status.

    ``is_through``: whether the target is known to have taken the call, so that the status is its own.
    """
    known = {int(one) for one in _MEANINGS} - ({ExitStatus.NO_ROOM} if is_through else set())
    if status not in known:
        return f"the call ended with exit status {status}"
    return f"{_MEANINGS[ExitStatus(status)]} (exit status {status})"
