# SPDX-License-Identifier: GPL-2.0-or-later
"""Times as users write and read them: ``8h`` or ``tomorrow 8:00`` in, "in 8 h" out. UNIX seconds alone are
stored.
"""

import re
import time

from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.common.values import TIME_MAX, parse_number

_UNITS = {"w": 7 * 86400, "d": 86400, "h": 3600, "m": 60, "s": 1}
# The last number may lack its unit, which is seconds then.
_SPAN = re.compile(r"\+?" + "".join(f"(?:([0-9]{{1,9}}){unit})?" for unit in "wdhm") + "(?:([0-9]{1,9})s?)?")
_CLOCK = re.compile(r"([0-9]{1,2}):([0-9]{2})")
_DAYS = {"today": 0, "tomorrow": 1}
EXPECTED = (
    "a time such as 8h, 1h30m, 2d, 18:00, tomorrow 8:00, 2030-01-31, 2030-01-31T18:00, UNIX seconds, or never"
)


def parse_expire(text: str, now: float) -> int | None:
    """UNIX seconds, None for ``never``; see `EXPECTED`. Raises `TextError`.

    A span of time counts from ``now``. A time without a zone is local, a date alone means its midnight, and
    a time alone is that of today, or of tomorrow if that is over.
    """
    if text == "never":
        return None
    try:
        if text.isdigit():
            seconds = parse_number(text)
        elif (span := parse_span(text)) is not None:
            seconds = int(now) + span
        else:
            seconds = _at(text, now)
    except (ValueError, OverflowError, OSError):
        raise TextError(text, EXPECTED) from None
    if not 0 < seconds <= TIME_MAX:
        raise TextError(text, EXPECTED)
    return seconds


def parse_span(text: str) -> int | None:
    """The seconds of ``+1h30m``, ``90m`` or ``+300``; None if it is no span of time."""
    numbers = _SPAN.fullmatch(text)
    if numbers is None or text in ("", "+"):
        return None
    return sum(int(n) * size for n, size in zip(numbers.groups(), _UNITS.values(), strict=True) if n)


def _at(text: str, now: float) -> int:
    """The UNIX seconds of a clock's time or a date. Raises ValueError, OverflowError and OSError."""
    from datetime import datetime, timedelta

    word, _, rest = text.partition(" ")
    days = _DAYS.get(word)
    clock = _CLOCK.fullmatch(text if days is None else rest or "0:00")
    if clock is None:
        return int(datetime.fromisoformat(text).timestamp())
    hour, minute = int(clock[1]), int(clock[2])
    today = datetime.fromtimestamp(now).replace(hour=hour, minute=minute, second=0, microsecond=0)
    if days is None:
        days = 1 if today.timestamp() <= now else 0
    return int((today + timedelta(days=days)).timestamp())


def print_expire(expire: int | None, now: float) -> str:
    """``never``, or the local time and how far off that is."""
    return "never" if expire is None else f"{print_time(expire)} ({distance(expire - now)})"


def print_time(seconds: float) -> str:
    """The local time to the minute, with its zone."""
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds))


def local(untrusted_seconds: int) -> str:
    """A time that a qube gave, in dom0's time zone; it may be out of range."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(untrusted_seconds))
    except (OverflowError, ValueError, OSError):
        return "an unknown time"


def amount(seconds: int) -> str:
    """``8 h``: in the largest unit of which there are two."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or (unit == "min" and seconds >= length):
            return f"{round(seconds / length)} {unit}"
    return f"{seconds} s"


def distance(seconds: float) -> str:
    """``in 8 h`` or ``3 min ago``."""
    size = amount(abs(int(seconds)))
    return f"in {size}" if seconds > 0 else f"{size} ago"
