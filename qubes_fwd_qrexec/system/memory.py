# SPDX-License-Identifier: GPL-2.0-or-later
"""How much memory this qube has."""

import os


def memory_bytes() -> int:
    """The qube's memory now: dom0 gives it more when it needs it, and takes it back (docs/facts.md, U7)."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
