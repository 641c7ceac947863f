# SPDX-License-Identifier: GPL-2.0-or-later
"""Words for what listeners say: why a forward is not open, and which connections of closed ones go on."""

from qubes_fwd_qrexec.admin.states import Forward
from qubes_fwd_qrexec.common.config import Service

from .listeners import GoesOn, Has, Uptake
from .tables import counted

IN_PART = "not all of its ports are open"
FIREWALL = "its firewall lets nobody in to a port that the listener does not listen on"


def note(forward: Forward, uptake: Uptake) -> str | None:
    """Why a forward is not open, and the command that says more; None if it is open or nobody answered."""
    text = trouble(forward, uptake)
    return None if text is None else f"{text}; 'qvm-forward diagnose {forward.named}' says what helps"


def trouble(forward: Forward, uptake: Uptake) -> str | None:
    """Why a forward is not open; None if it is open or nobody answered."""
    texts = {
        Has.NOT_OFFERED: "has not told dom0 that it has qubes-fwd-qrexec, without which it does not listen",
        Has.NO_SERVICE: "does not have qubes-fwd-qrexec, without which it does not listen",
        Has.NO_LISTENER: f"does not listen: {uptake.said or 'no listener is running'}",
        Has.NOT_YET: "does not have it open yet",
        Has.FAILED: f"does not have it open: {uptake.said}",
        Has.IN_PART: f"does not have it open: {IN_PART}",
        Has.FIREWALL: f"does not have it open: {FIREWALL}",
    }
    return f"{forward.exposed} {texts[uptake.has]}" if uptake.has in texts else None


def still_open(left: GoesOn) -> str:
    """Which connections of a closed forward go on, and why."""
    if left.target is None:
        return (
            f"{left.exposed} does not say whether it has connections over {Service.CONNECT_TCP}, which "
            "dom0 cannot end"
        )
    what = f"{left.target} {left.name}: {connections(left)}"
    if left.left_s is not None:
        return f"{what} at {left.exposed} may go on for at most {left.left_s} s"
    where = f"; {left.exposed} does not say" if left.connections is None else f" at {left.exposed}"
    if left.service is Service.CONNECT_TCP:
        return f"{what} over {Service.CONNECT_TCP}, which dom0 cannot end{where}"
    return f"{what} over a call that another forward needs, so that dom0 cannot end it{where}"


def connections(left: GoesOn) -> str:
    """How many go on, if that is known."""
    return "connections" if left.connections is None else counted(left.connections, "connection")
