# SPDX-License-Identifier: GPL-2.0-or-later
"""What the qubes say of the forwards: what they carry, who is connected, what goes on that should not.

It is untrusted, and `common.report` has checked it. Nothing is decided by it.
"""

from typing import NamedTuple

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.views.status import Status, asked

from .look import Look


class Figures(NamedTuple):
    """What the qubes answered at the time ``at``, in UNIX seconds."""

    at: float
    status: Status


def ask(backend: Backend, look: Look, now: float) -> Figures:
    """Ask all qubes at once. It takes as long as the slowest, up to 8 s. Raises `StoreError`."""
    return Figures(now, asked(look.snapshot, look.plan, now, backend, with_clients=True))
