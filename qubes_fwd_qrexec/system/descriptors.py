# SPDX-License-Identifier: GPL-2.0-or-later
"""How many files this process may have open: as many as the system lets it.

The soft limit is 1024 unless somebody says other (systemd too), for programs that use select(2), which
can count no further; ours does not. With 10,000 connections a process needs as many descriptors.
"""

import resource


def raise_descriptor_limit() -> int:
    """Raise the soft limit to the hard one; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
