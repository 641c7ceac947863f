# SPDX-License-Identifier: GPL-2.0-or-later
"""`qvm-forward watch`: what `apply` does, after each change that matters and whenever a rule's time is over.

It looks at the whole system each time and makes true what the rules ask for. So whatever it missed, was
killed in or could not do is mended by the next time. Its own writes are changes too; one more look finds
nothing to do, and there it settles. While nothing happens it looks at the clock, and at nothing else.
"""

import json
import math
import select
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from enum import Enum, auto
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import ForwardError, StoreError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.system.notify import notify

from . import policy
from .apply import Outcome
from .backend import Changes
from .clock import Clock
from .ending import Ending
from .expiry import print_expire
from .inventory import Inventory
from .reconcile import reconcile
from .revoking import Ended, allowances, revoke, serving
from .states import Cause, Plan, State
from .views import reasons, steps
from .views.render import escaped
from .views.session import Session

# A tool that sets up a qube sends its events within milliseconds of each other; a person waits for a second.
QUIET_S = 0.2
BURST_S = 1.0
# The clock may be set, and the machine be suspended, while a wait goes on: how late that is noticed at most.
# Listeners end to the second by themselves.
TICK_S = 30.0
# qubesd is back some seconds after it was restarted.
RETRY_S = 5.0
# Less is the work of clock synchronisation, and changes nothing that anybody would see.
_SET_BACK_S = 60.0

Key = tuple[QubeName, str]


class Seen(NamedTuple):
    """What became of one rule, as it was told."""

    state: State
    cause: Cause
    reason: str


class _Trouble(Enum):
    """What may go wrong, and goes on for as long as it does."""

    NEWS = auto()
    APPLY = auto()


def watch(args: Namespace, session: Session) -> int:
    """Run until SIGTERM or SIGINT."""
    with Ending() as ending, session.backend.watching():
        Watcher(session, Clock(), ending).run()
    return 0


def _ready(fd: int, timeout_s: float) -> None:
    """Wait until it is readable, or the time is over."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll(math.ceil(timeout_s * 1000))


class Watcher:
    """The loop. A trouble is told once, and what failed is tried again every 5 s."""

    def __init__(
        self,
        session: Session,
        clock: Clock,
        ending: Ending,
        *,
        elapsed: Callable[[], float] = time.monotonic,
        rest: Callable[[int, float], None] = _ready,
    ) -> None:
        self._session = session
        self._clock = clock
        self._ending = ending
        self._elapsed = elapsed
        self._rest = rest
        self._seen: dict[Key, Seen] | None = None
        self._next_end: float | None = None
        # What is wrong, in the order of telling; each kind of trouble ends by itself.
        self._troubles: dict[_Trouble, str] = {}
        self._is_clock_told = False
        # Whoever had a rule at any look: one that is gone may have been in force when a call was allowed.
        self._targets: set[QubeName] = set()
        # The targets that run and know what is allowed.
        self._told: set[QubeName] = set()
        self._was_held = False
        # Those that could not be told when something ended.
        self._owed: set[QubeName] = set()

    def run(self) -> None:
        """Until the end is asked for; a reconciliation that has begun is finished."""
        while not self._ending.is_asked:
            try:
                with self._session.backend.changes((self._ending.fileno(),)) as changes:
                    self._follow(changes)
            except StoreError as error:
                self._complain(_Trouble.NEWS, f"changes are not noticed for now: {error}")
                self._rest(self._ending.fileno(), RETRY_S)
        notify("STOPPING=1")

    def _follow(self, changes: Changes) -> None:
        """Reconcile, wait, and again. Raises `StoreError` when the news is lost."""
        self._reconcile()
        while not self._ending.is_asked:
            if _Trouble.APPLY in self._troubles:
                # What was tried and failed may itself be news, and must not be tried at once again.
                self._rest(self._ending.fileno(), RETRY_S)
            if changes.wait(self._timeout_s()):
                self._mended(_Trouble.NEWS)
                self._settle(changes)
            elif not self._is_due():
                continue
            if not self._ending.is_asked:
                self._reconcile()

    def _timeout_s(self) -> float:
        if _Trouble.APPLY in self._troubles:
            return 0.0
        left_s = TICK_S if self._next_end is None else self._next_end - self._clock.now()
        return max(0.0, min(TICK_S, left_s))

    def _is_due(self) -> bool:
        is_over = self._next_end is not None and self._next_end <= self._clock.now()
        self._check_clock()
        return is_over or bool(self._troubles)

    def _settle(self, changes: Changes) -> None:
        """Let a burst come to its end; one that does not end is cut short."""
        deadline = self._elapsed() + BURST_S
        while (left_s := deadline - self._elapsed()) > 0 and changes.wait(min(QUIET_S, left_s)):
            pass

    def _reconcile(self) -> None:
        now = self._clock.now()
        backend = self._session.backend
        try:
            with backend.locked():
                planned, outcome, snapshot = reconcile(backend, now)
        except ForwardError as error:
            self._complain(_Trouble.APPLY, str(error))
            return
        self._session.warn_unread(snapshot)
        self._owed |= {found.target for found in outcome.ended if found.problem is not None}
        outcome = outcome._replace(ended=self._tell(planned, snapshot.inventory))
        self._next_end = next_end(planned, now)
        self._report(planned, outcome, now)
        self._check_clock()
        if troubles := steps.troubles(outcome):
            self._complain(_Trouble.APPLY, f"not everything could be done: {'; '.join(troubles)}")
            return
        self._mended(_Trouble.APPLY)
        notify("READY=1", f"STATUS={self._status(planned, now)}")

    def _tell(self, planned: Plan, inventory: Inventory) -> tuple[Ended, ...]:
        """Tell targets that have started what is allowed: dom0 may have allowed a call before it was over,
        while its target was still starting. All are told when everything is held, by whomever; and those that
        could not be told when something ended, until they are.
        """
        self._targets |= {forward.source.target for forward in planned}
        running = {name for name in serving(inventory) if planned.is_held or name in self._targets}
        self._owed &= {qube.name for qube in inventory.qubes.values() if qube.is_running}
        fresh = running if planned.is_held and not self._was_held else running - self._told
        self._told, self._was_held = running, planned.is_held
        lines = {line for forward in planned.live for line in policy.lines(forward)}
        told = allowances(fresh | self._owed, lines, cuts_drains=planned.is_held)
        ended = revoke(told, self._session.backend)
        failed = {found.target for found in ended if found.problem is not None}
        self._told -= failed
        self._owed &= failed
        # One that has started is told with the next change, and bounded by its lease until then.
        return tuple(found for found in ended if found.target in self._owed or found.problem is None)

    def _report(self, planned: Plan, outcome: Outcome, now: float) -> None:
        seen = states(planned)
        news = [] if self._seen is None else list(differing(self._seen, seen))
        self._seen = seen
        if self._session.is_json:
            if outcome.done or not outcome.is_whole or news:
                done = [steps.as_json(step) for step in outcome.done]
                data = {"time": now, "news": news, "steps": done, "problems": list(steps.troubles(outcome))}
                # One object a line, and not session.say_json, which writes for people too.
                self._session.say(f"{json.dumps(data)}\n")
        else:
            words = [word for step in outcome.done for word in steps.words(step)]
            self._session.say("".join(f"{escaped(line)}\n" for line in (*news, *words)))
        self._session.out.flush()

    def _status(self, planned: Plan, now: float) -> str:
        count = len(planned.forwards) + len(planned.broken)
        words = [f"{len(planned.live)} of {count} forwards open"]
        if self._next_end is not None:
            words.append(f"the next ends {print_expire(int(self._next_end), now)}")
        return "; ".join((*words, *map(escaped, self._troubles.values())))

    def _complain(self, trouble: _Trouble, text: str) -> None:
        """Tell a trouble, the same one once. One without which we could start is no reason not to start."""
        is_new = self._troubles.get(trouble) != text
        self._troubles[trouble] = text
        if is_new:
            self._warn(text)
        notify("READY=1", f"STATUS={escaped(text)}")

    def _mended(self, trouble: _Trouble) -> None:
        if self._troubles.pop(trouble, None) is not None and not self._troubles:
            self._warn("all is well again")

    def _warn(self, text: str) -> None:
        for line in text.splitlines():
            self._session.warn(escaped(line))
        self._session.err.flush()

    def _check_clock(self) -> None:
        ahead_s = self._clock.ahead_s()
        if ahead_s >= _SET_BACK_S and not self._is_clock_told:
            self._warn(
                f"the clock was set back by {ahead_s:.0f} s; rules end as if it had not been, until "
                "'qvm-forward watch' starts again"
            )
        self._is_clock_told = ahead_s >= _SET_BACK_S


def next_end(planned: Plan, now: float) -> float | None:
    """When the next enabled rule ends."""
    ends = [
        f.source.rule.expire
        for f in planned
        if f.source.rule.enabled
        and not f.source.rule.has_ended
        and f.source.rule.expire is not None
        and f.source.rule.expire > now
    ]
    return min(ends, default=None)


def states(planned: Plan) -> dict[Key, Seen]:
    """What there is to be told of each rule, and of what cannot be read as one."""
    seen: dict[Key, Seen] = {
        (f.source.target, f.source.name): Seen(f.state, f.cause, reasons.sentence(f)) for f in planned
    }
    for rule in planned.broken:
        seen[rule.target, rule.name] = Seen(State.BROKEN, Cause.UNREADABLE, f"{rule.problem}.")
    return seen


def differing(before: Mapping[Key, Seen], after: Mapping[Key, Seen]) -> Iterable[str]:
    """A sentence for each rule that came, went, or is in another state than before."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        name = " ".join(key)
        if new is None:
            yield f"{name} is no longer there"
        elif old is None:
            yield f"{name} is new, and {new.state}. {new.reason}"
        elif (old.state, old.cause) != (new.state, new.cause):
            yield f"{name} was {old.state} and is {new.state}. {new.reason}"
