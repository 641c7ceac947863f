# SPDX-License-Identifier: GPL-2.0-or-later
"""Why connections are not carried, in the words of logs, reports and metrics."""

from enum import StrEnum


class Refusal(StrEnum):
    """Why a connection was not carried. Other words of small letters and dashes are counted, too, such as
    those of `limits.NotAdmitted`."""

    POLICY = "policy"
    """dom0 refuses the call (exit status 126)."""
    NO_SERVICE = "no-service"
    """The target lacks the service (exit status 127)."""
    SERVER = "server"
    """The server in the target took no connection."""
    LOOPBACK = "loopback"
    """The server in the target listens at loopback addresses alone, to which no packet of others gets. At
    127.0.0.1 or ::1 it is for calls."""
    NOT_AT_LOOPBACK = "not-at-loopback"
    """The server in the target listens neither at 127.0.0.1 nor at ::1, and a call gets nowhere else, as
    nobody has named the place."""
    ELSEWHERE = "elsewhere"
    """The target's owner has named the place of the server. Where that is no refusal, it is there."""
    BUSY = "busy"
    """There are so many calls or connections already that no more may wait."""
    NO_CALL = "no-call"
    """No call could be made, for any other reason."""
