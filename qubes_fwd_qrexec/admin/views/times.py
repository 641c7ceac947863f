# SPDX-License-Identifier: GPL-2.0-or-later
"""Times as users read them: "in 8 h"."""

import time

from qubes_fwd_qrexec.common.values import TIME_MAX


def print_expire(expire: int | None, now: float) -> str:
    """``never``, or the local time and how far off that is."""
    if expire is None:
        return "never"
    if not 0 <= expire <= TIME_MAX:
        return f"{expire} (UNIX seconds)"
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
