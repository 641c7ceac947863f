# SPDX-License-Identifier: GPL-2.0-or-later
"""How many files this process may have open: as many as the system allows.

The default soft limit is 1024, also in systemd, for the sake of programs that use select(2), which cannot
handle more. Ours do not use it, and 10,000 connections need as many descriptors.
"""

import resource


def raise_descriptor_limit() -> int:
    """Raise the soft limit to the hard one. Returns that limit; below 0 means no limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
