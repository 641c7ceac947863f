# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes on of a forward that has ended: a call of the stock service, or one that another forward needs,
which only its listener can end.

So the listener is asked what it still has, for as long as it needs to take up that the forward is gone.
"""

import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from qubes_fwd_qrexec.common.config import Service
from qubes_fwd_qrexec.common.values import QubeName

from . import policy
from .answers import NO_SERVICE, AnswerError, NotRunningError
from .backend import Backend
from .figures import ask
from .states import Forward, Plan, State
from .uptake import ASKED_AT_S

# A listener answers within some tenths of a second.
_TIMEOUT_S = 1.0
_AT_ONCE = 32


class Stock(NamedTuple):
    """Connections of a forward that has ended. ``connections`` is None where nobody tells how many.

    ``target`` and ``name`` are None where it is not known of which forwards there could be any.
    ``left_s``: they may go on to their own end, as their rule says, and are cut after that; else None.
    """

    target: QubeName | None
    name: str | None
    exposed: QubeName
    connections: int | None
    left_s: int | None = None
    service: Service = Service.CONNECT_TCP

    def words(self) -> str:
        """For people: what may go on."""
        if self.target is None:
            return (
                f"{self.exposed} does not say whether it has connections over {Service.CONNECT_TCP}, which "
                "dom0 cannot end"
            )
        count = "connections" if self.connections is None else f"{self.connections} connections"
        count = "1 connection" if self.connections == 1 else count
        what = f"{self.target} {self.name}: {count}"
        if self.left_s is not None:
            return f"{what} at {self.exposed} may go on for at most {self.left_s} s"
        where = f"; {self.exposed} does not say" if self.connections is None else f" at {self.exposed}"
        if self.service is not Service.CONNECT_TCP:
            return f"{what} over a call that another forward needs, so that dom0 cannot end it{where}"
        return f"{what} over {Service.CONNECT_TCP}, which dom0 cannot end{where}"

    def as_json(self) -> dict[str, Any]:
        return self._asdict()


def ended(before: Plan, after: Plan) -> list[Forward]:
    """The forwards that were in force and are no more, and whose calls dom0 cannot end: those over the stock
    service, and those over calls that others need. What is only changed has a right to its connections.
    """
    still = {(*forward.source[:2], forward.exposed) for forward in after.live}
    needed = {policy.calls_of(line) for forward in after.live for line in policy.lines(forward)}
    return [
        forward
        for forward in before.live
        if forward.state is State.ACTIVE
        and (*forward.source[:2], forward.exposed) not in still
        and (
            forward.service is Service.CONNECT_TCP
            or not needed.isdisjoint(map(policy.calls_of, policy.lines(forward)))
        )
    ]


def left_over(
    over: Iterable[Forward],
    backend: Backend,
    *,
    everything_at: Collection[QubeName] = (),
    elapsed: Callable[[], float] = time.monotonic,
    rest: Callable[[float], None] = time.sleep,
) -> tuple[Stock, ...]:
    """What is left of forwards that are over, and of whatever else there is at some qubes.

    Those are asked until nothing is left; else it is enough that what is left may finish.
    """
    begun = elapsed()
    asked: dict[QubeName, dict[tuple[QubeName, str], Service]] = {qube: {} for qube in everything_at}
    for forward in over:
        if forward.exposed is not None:
            service = forward.service or Service.CONNECT_TCP
            asked.setdefault(forward.exposed, {})[forward.source[:2]] = service
    found: list[Stock] = []
    for at in ASKED_AT_S if asked else ():
        rest(max(0.0, begun + at - elapsed()))
        found = []
        for (exposed, keys), counts in zip(
            sorted(asked.items()), _all_counts(sorted(asked), backend), strict=True
        ):
            if counts is None:
                found += [Stock(*key, exposed, None, None, service) for key, service in keys.items()]
                if not keys:
                    found.append(Stock(None, None, exposed, None))
                continue
            for key, (count, left_s) in counts.items():
                if count and (key in keys or exposed in everything_at):
                    service = keys.get(key, Service.CONNECT_TCP)
                    found.append(Stock(*key, exposed, count, left_s, service))
        if all(stock.left_s is not None for stock in found) and not (found and everything_at):
            break
    return tuple(found)


def draining(
    keys: Collection[tuple[str, str]], qubes: Collection[QubeName], backend: Backend
) -> tuple[Stock, ...]:
    """What some forwards that were over before still have at any of the qubes, which are asked once."""
    counts = zip(qubes, _all_counts(qubes, backend), strict=True) if keys else ()
    return tuple(
        Stock(*key, qube, count, left_s)
        for qube, found in counts
        for key, (count, left_s) in (found or {}).items()
        if count and key in keys
    )


def _all_counts(
    qubes: Collection[QubeName], backend: Backend
) -> list[dict[tuple[QubeName, str], tuple[int, int | None]] | None]:
    """Those of many qubes, asked at once: a system may have dozens."""
    from concurrent.futures import ThreadPoolExecutor

    if len(qubes) < 2:
        return [_counts(qube, backend) for qube in qubes]
    with ThreadPoolExecutor(min(_AT_ONCE, len(qubes))) as pool:
        return list(pool.map(lambda qube: _counts(qube, backend), qubes))


def _counts(qube: QubeName, backend: Backend) -> dict[tuple[QubeName, str], tuple[int, int | None]] | None:
    """Connections, and seconds left to those that drain, of each forward that a listener has; None if it does
    not say.
    """
    try:
        answer = ask(backend, qube, timeout_s=_TIMEOUT_S)
    except NotRunningError:
        return {}
    except AnswerError as error:
        return {} if error.status == NO_SERVICE else None
    listener = answer.listener
    found: dict[tuple[QubeName, str], tuple[int, int | None]] = {}
    for old in () if listener is None else listener.draining:
        count, left_s = found.get((old.target, old.name), (0, 0))
        found[old.target, old.name] = count + old.connections, max(left_s or 0, old.left_s)
    for forward in () if listener is None else listener.forwards:
        if forward.connections:
            found[forward.target, forward.name] = forward.connections, None
    return found
