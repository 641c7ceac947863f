# SPDX-License-Identifier: GPL-2.0-or-later
"""What the indicator shows: whether it is there at all, which icon it has, and what its tooltip says."""

from typing import NamedTuple

from qubes_fwd_qrexec.admin.views.tables import escaped, shortened

from .look import Look
from .summary import Tone, summary
from .words import _

UNKNOWN_ICON = "qubes-forward-unknown"
_TROUBLE_MAX = 500
# They differ in their shapes.
_ICONS = {
    Tone.CLOSED: "",
    Tone.OPEN: "qubes-forward-open",
    Tone.ANYBODY: "qubes-forward-anybody",
    Tone.HELD: "qubes-forward-held",
    Tone.UNKNOWN: UNKNOWN_ICON,
}


class Indication(NamedTuple):
    """Without an ``icon`` nothing is shown; ``text`` is plain."""

    icon: str
    text: str


def indication(look: Look | None, trouble: str | None) -> Indication:
    """What to show of the last look. ``trouble`` is why it may be out of date, or why there is none."""
    if trouble is None:
        # Before the first look nothing is claimed.
        return (
            Indication("", "")
            if look is None
            else Indication(_ICONS[(found := summary(look)).tone], found.text)
        )
    text = _("What is open is unknown: {why}").format(why=shortened(escaped(trouble), _TROUBLE_MAX))
    if look is not None:
        before = _("Last known: {summary}").format(summary=summary(look).text)
        text = f"{text}\n{before}"
    return Indication(UNKNOWN_ICON, text)
