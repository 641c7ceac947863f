# SPDX-License-Identifier: GPL-2.0-or-later
"""Times as users write and read them: ``+8h`` in, "in 8 h" out. UNIX seconds alone are stored."""

import re
import time

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
        from datetime import datetime

        try:
            # fromisoformat() would take a week's date and a bare date too; the latter means midnight.
            seconds = int(datetime.fromisoformat(text).timestamp())
        except (ValueError, OverflowError, OSError):
            raise TextError(text, EXPECTED) from None
    if not 0 < seconds <= TIME_MAX:
        raise TextError(text, EXPECTED)
    return seconds


def print_expire(expire: int | None, now: float) -> str:
    """``never``, or the local time and how far off that is."""
    if expire is None:
        return "never"
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(expire))
    return f"{written} ({distance(expire - now)})"


def distance(seconds: float) -> str:
    """``in 8 h`` or ``3 min ago``: in the largest unit of which there are two."""
    size = abs(int(seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if size >= 2 * length or (unit == "min" and size >= length):
            amount = f"{round(size / length)} {unit}"
            break
    else:
        amount = f"{size} s"
    return f"in {amount}" if seconds > 0 else f"{amount} ago"
