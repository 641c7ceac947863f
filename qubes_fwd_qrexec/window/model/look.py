# SPDX-License-Identifier: GPL-2.0-or-later
"""One look at the system: rules, plan, and what is not in force as they ask for."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from qubes_fwd_qrexec.admin import snapshot
from qubes_fwd_qrexec.admin.apply import Step, differences
from qubes_fwd_qrexec.admin.backend import Backend, PolicyVerdict
from qubes_fwd_qrexec.admin.snapshot import Snapshot
from qubes_fwd_qrexec.admin.states import Key, Plan
from qubes_fwd_qrexec.admin.views.judged import denied, judged_apart, together
from qubes_fwd_qrexec.common.config import ForwardKey
from qubes_fwd_qrexec.common.errors import ForwardError

from .entries import Entries, entries


@dataclass(frozen=True)
class Look:
    """The system at the time ``now``, in UNIX seconds.

    ``denials`` say why dom0's policy denies a live forward's calls all the same, by ``verdicts``, which are
    None where it cannot say anything. ``due`` is what is not in force as the rules ask for, or is and should
    not be. ``watch_start`` starts `watch`, where that does not run. ``read_only`` says why nothing can be
    changed from here.
    """

    snapshot: Snapshot
    plan: Plan
    now: float
    denials: Mapping[Key, str]
    due: tuple[Step, ...]
    watch_start: str | None
    read_only: str | None = None
    verdicts: Mapping[ForwardKey, PolicyVerdict] | None = None

    @cached_property
    def entries(self) -> Entries:
        """What is shown of each rule."""
        return entries(self.plan, self.due, self.denials)


def look_at(backend: Backend, now: float, known: Plan | None = None) -> Look:
    """Read the system, which takes a while; ``known`` is an earlier plan, which spares some of it. Raises
    `StoreError`.
    """
    found = snapshot.look(backend, with_config=True)
    planned = found.plan(now, known=known)
    due = tuple(differences(planned, found.inventory, found.installed))
    verdicts = None
    with suppress(ForwardError, OSError):  # the figures say so
        verdicts = judged_apart(planned.live, backend, found.installed)
    denials = denied(together(verdicts or {}))
    look = Look(found, planned, now, denials, due, backend.unwatched(), backend.read_only(), verdicts)
    look.entries  # noqa: B018  made here, so that the main thread need not wait for it
    return look
