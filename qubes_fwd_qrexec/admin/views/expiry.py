# SPDX-License-Identifier: GPL-2.0-or-later
"""When a rule ends, as users write it: ``+8h`` in, UNIX seconds out, which alone are stored."""

import re

from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.common.values import TIME_MAX, parse_number

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_RELATIVE = re.compile(r"\+([0-9]{1,9})([smhdw]?)\Z", re.ASCII)
EXPECTED = "a time such as +8h, +30m, +2d, +300 (seconds), 2030-01-31T18:00, UNIX seconds, or never"


def parse_expire(text: str, now: float) -> int | None:
    """UNIX seconds, None for ``never``. An ISO time without zone is local. Raises `TextError`."""
    if text == "never":
        return None
    relative = _RELATIVE.match(text)
    if relative is not None:
        seconds = int(now) + int(relative[1]) * _UNITS[relative[2] or "s"]
    elif text.isdigit():
        seconds = parse_number(text)
    else:
        seconds = _parse_iso(text)
    if not 0 < seconds <= TIME_MAX:
        raise TextError(text, EXPECTED)
    return seconds


def _parse_iso(text: str) -> int:
    from datetime import datetime

    try:
        # fromisoformat() would take a week's date and a bare date too; the latter means midnight.
        return int(datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError, OSError):
        raise TextError(text, EXPECTED) from None
