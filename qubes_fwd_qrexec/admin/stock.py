# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes on of a forward that has ended: a call of the stock service, which only its listener can end.

So the listener is asked what it still has, for as long as it needs to take up that the forward is gone.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from qubes_fwd_qrexec.config import Service
from qubes_fwd_qrexec.values import QubeName

from .answers import NO_SERVICE, AnswerError, NotRunningError
from .backend import Backend
from .figures import ask
from .states import Forward, Plan, State
from .uptake import ASKED_AT_S

# A listener answers within some tenths of a second.
_TIMEOUT_S = 1.0


class Stock(NamedTuple):
    """Connections over the stock service. ``connections`` is None where nobody tells how many.

    ``left_s``: they may go on to their own end, as their rule says, and are cut after that; else None.
    """

    target: QubeName
    name: str
    exposed: QubeName
    connections: int | None
    left_s: int | None = None

    @property
    def is_open(self) -> bool:
        return self.connections != 0

    def words(self) -> str:
        """For people: what may go on."""
        count = "connections" if self.connections is None else f"{self.connections} connections"
        count = "1 connection" if self.connections == 1 else count
        what = f"{self.target} {self.name}: {count} over {Service.CONNECT_TCP}"
        if self.left_s is not None:
            return f"{what} may go on for at most {self.left_s} s"
        where = f"; {self.exposed} does not say" if self.connections is None else f" at {self.exposed}"
        return f"{what}, which dom0 cannot end{where}"

    def as_json(self) -> dict[str, Any]:
        return self._asdict()


def ended(before: Plan, after: Plan) -> list[Forward]:
    """The forwards over the stock service that were in force and are no more, or in another form."""
    still = {forward.config for forward in after.live}
    return [
        forward
        for forward in before.live
        if forward.service is Service.CONNECT_TCP
        and forward.state is State.ACTIVE
        and forward.config not in still
    ]


def left_over(
    over: Iterable[Forward],
    backend: Backend,
    *,
    elapsed: Callable[[], float] = time.monotonic,
    rest: Callable[[float], None] = time.sleep,
) -> tuple[Stock, ...]:
    """What is left of forwards that are over, where anything is."""
    begun = elapsed()
    pending = {(forward.source.target, forward.source.name): forward for forward in over}
    found: dict[tuple[str, str], Stock] = {}
    for at in ASKED_AT_S if pending else ():
        rest(max(0.0, begun + at - elapsed()))
        for exposed in sorted({f.exposed for f in pending.values() if f.exposed is not None}):
            counts = _counts(exposed, backend)
            for key in [key for key, forward in pending.items() if forward.exposed == exposed]:
                found[key] = Stock(
                    *key, exposed, *((None, None) if counts is None else counts.get(key, (0, None)))
                )
                if found[key].connections == 0 or found[key].left_s is not None:
                    del pending[key]
        if not pending:
            break
    return tuple(stock for stock in found.values() if stock.is_open)


def _counts(qube: QubeName, backend: Backend) -> dict[tuple[QubeName, str], tuple[int, int | None]] | None:
    """Connections, and seconds left to those that drain, of each forward that a listener has; None if it does
    not say.
    """
    try:
        listener = ask(backend, qube, timeout_s=_TIMEOUT_S).listener
    except NotRunningError:
        return {}
    except AnswerError as error:
        return {} if error.status == NO_SERVICE else None
    if listener is None:
        return {}
    found: dict[tuple[QubeName, str], tuple[int, int | None]] = {}
    for old in listener.draining:
        count, left_s = found.get((old.target, old.name), (0, 0))
        found[old.target, old.name] = count + old.connections, max(left_s or 0, old.left_s)
    for forward in listener.forwards:
        if forward.connections:
            found[forward.target, forward.name] = forward.connections, None
    return found
