# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the forwards of one exposed qube fit into the qrexec calls that its listener makes at once."""

from collections.abc import Iterable, Iterator

from qubes_fwd_qrexec.common.config import CALLS_MAX
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.values import QubeName, TargetPorts

from .states import Forward


def with_call_room(forwards: Iterable[Forward]) -> Iterator[Forward]:
    """Say it where an exposed qube has forwards for more calls than it makes at once.

    Those of a mux call to the same ports of a target share one; a rule over single calls needs one at least.
    """
    found = list(forwards)
    calls: dict[QubeName, set[tuple[QubeName, TargetPorts, object]]] = {}
    for forward in found:
        if forward.is_live and forward.exposed is not None:
            named = forward.source
            is_single = forward.transport is Transport.CALL
            needed = named.target, named.rule.target_ports, named.name if is_single else None
            calls.setdefault(forward.exposed, set()).add(needed)
    for forward in found:
        needs = len(calls.get(forward.exposed, ())) if forward.is_live and forward.exposed is not None else 0
        if needs <= CALLS_MAX:
            yield forward
            continue
        hint = (
            f"the forwards of {forward.exposed} need {needs} qrexec calls, and it makes {CALLS_MAX} at once: "
            "those that nobody uses give theirs up, and while all are in use, further connections wait"
        )
        yield forward._replace(hints=(*forward.hints, hint))
