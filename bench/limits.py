# SPDX-License-Identifier: GPL-2.0-or-later
"""How many descriptors a process of the bench may have: as many as the system lets it."""

import resource


def raise_descriptor_limit() -> int:
    """Raise the soft limit to the hard one; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
