# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines for systemd's journal that have fields besides their text, so that a reader can ask for one field.

One datagram is one entry, and no library is needed (docs/facts.md, U6). A program does this where its stderr
is the journal anyway: journald knows its unit, and shows the entries among its other lines.
"""

import os
import socket
from collections.abc import Mapping

JOURNAL = "/run/systemd/journal/socket"


def is_journal(fd: int, stream: str | None) -> bool:
    """Whether systemd has connected ``fd`` to the journal; ``stream``: the unit's JOURNAL_STREAM.

    Who has sent stderr elsewhere since still has the variable, but another file (systemd.exec(5)).
    """
    status = os.fstat(fd)
    return stream == f"{status.st_dev}:{status.st_ino}"


def write_entry(fields: Mapping[str, str], journal: str = JOURNAL) -> bool:
    """Write an entry at once, or return False where nobody takes it.

    A name has capitals, digits and ``_``, and begins with a letter. A line feed would begin another field, so
    no value may have one. journald wants MESSAGE; PRIORITY and SYSLOG_IDENTIFIER are as those of syslog(3).
    """
    entry = "".join(f"{name}={value}\n" for name, value in fields.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(entry.encode("ascii", "replace"), journal)
    except OSError:
        return False
    return True
