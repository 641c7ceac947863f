# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the listeners took up what they were told, asked just after a change: of a port that another
program holds, dom0 hears by this alone.

Nothing is decided by the answers, and nobody waits long for them: a qube that does not answer at once is
let be, and says nothing of a forward.
"""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from qubes_fwd_qrexec.common.config import Service
from qubes_fwd_qrexec.common.values import QubeName

from .answers import AnswerError
from .backend import Backend
from .figures import ask, said_of
from .inventory import OFFER_PREFIX, Inventory
from .states import Forward, State

# A listener that reads QubesDB has what is new within half a second; what it says before may be of the old.
ASKED_AT_S = (0.0, 0.7, 1.3)
# All in all, with the last call.
BOUND_S = 2.0


def can_be_asked(forward: Forward, inventory: Inventory) -> bool:
    """Whether a listener should have it open now, in a qube that has our service."""
    is_open = forward.state is State.ACTIVE and forward.exposed is not None
    return is_open and lacking(forward, inventory) is None


def lacking(forward: Forward, inventory: Inventory) -> str | None:
    """What is to be said of an active forward whose exposed qube lacks our package, and so any listener."""
    exposed = forward.exposed
    if forward.state is not State.ACTIVE or exposed is None:
        return None
    if inventory.feature(exposed, f"{OFFER_PREFIX}{Service.FORWARD_TCP}"):
        return None
    what = "has not told dom0 that it has qubes-fwd-qrexec, without which it does not listen"
    return f"{exposed} {what}; {_way_out(forward)}"


def _way_out(forward: Forward) -> str:
    return f"'qvm-forward diagnose {forward.source}' says what helps"


def troubles(
    forwards: Iterable[Forward],
    renewed: Iterable[Forward],
    backend: Backend,
    *,
    elapsed: Callable[[], float] = time.monotonic,
    rest: Callable[[float], None] = time.sleep,
) -> dict[tuple[str, str], str]:
    """What keeps some of the forwards from being open, by target and name.

    ``renewed`` are those that were open before in another form: of them the first answer may be of that.
    """
    begun = elapsed()
    found: dict[tuple[str, str], str] = {}
    pending, old = list(forwards), {forward.source[:2] for forward in renewed}
    for number, at in enumerate(ASKED_AT_S):
        if not pending:
            break
        rest(max(0.0, begun + at - elapsed()))
        for qube in dict.fromkeys(forward.exposed for forward in pending):
            left_s = begun + BOUND_S - elapsed()
            here = [forward for forward in pending if forward.exposed == qube]
            told = {} if qube is None or left_s <= 0 else _asked(qube, here, backend, left_s)
            for forward in here:
                key = forward.source[:2]
                trouble = told.get(key)
                if trouble is None:
                    pending.remove(forward)
                    continue
                if trouble.text is not None:
                    found[key] = trouble.text
                    is_over = trouble.is_lasting or (trouble.is_certain and number > 0)
                else:
                    found.pop(key, None)
                    is_over = number > 0 or key not in old
                if is_over:
                    pending.remove(forward)
    return found


class _Told(NamedTuple):
    """What keeps a forward closed, or None. ``is_certain``: the listener has tried to open it;
    ``is_lasting``: there is no listener that could try.
    """

    text: str | None
    is_certain: bool = False
    is_lasting: bool = False


def _asked(
    qube: QubeName, forwards: Iterable[Forward], backend: Backend, timeout_s: float
) -> dict[tuple[str, str], _Told]:
    """What a qube says of each forward; nothing of any if it does not answer."""
    try:
        listener = (answer := ask(backend, qube, timeout_s=timeout_s)).listener
    except AnswerError:
        return {}
    told: dict[tuple[str, str], _Told] = {}
    for forward in forwards:
        way_out = _way_out(forward)
        if listener is None:
            why = answer.listener_problem or "no listener is running"
            found = _Told(f"{qube} does not listen: {why}; {way_out}", is_lasting=True)
        else:
            report, problem = said_of(forward, listener)
            if problem is not None:
                found = _Told(f"{qube} does not have it open: {problem}; {way_out}", is_certain=True)
            else:
                is_open = report is not None
                found = _Told(None if is_open else f"{qube} does not have it open yet; {way_out}")
        told[forward.source[:2]] = found
    return told
