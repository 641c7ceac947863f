# SPDX-License-Identifier: GPL-2.0-or-later
"""`qvm-forward watch`: what `apply` does, after each change that matters and whenever a rule's time is over.

It remembers nothing that it would need: each time it looks at the whole system and makes true what the
rules ask for. So whatever it missed, was killed in or could not do is mended by the next time. Its own
writes are changes too; one more look finds nothing to do, and there it settles.
"""

import json
import math
import select
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from enum import Enum, auto
from typing import NamedTuple

from qubes_fwd_qrexec.errors import ForwardError, StoreError
from qubes_fwd_qrexec.notify import notify
from qubes_fwd_qrexec.values import QubeName

from .apply import Outcome
from .backend import Changes
from .clock import Alarm, Clock
from .ending import Ending
from .expiry import print_expire
from .render import escaped
from .session import Session
from .states import Cause, Plan, State

# A tool that sets up a qube sends its events within milliseconds of each other; a person waits for a second.
QUIET_S = 0.2
BURST_S = 1.0
# qubesd is back some seconds after it was restarted; a fault that stays is asked for each minute.
RETRY_FIRST_S = 1.0
RETRY_MAX_S = 60.0
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
    with Ending() as ending, Alarm() as alarm:
        Watcher(session, Clock(), alarm, ending).run()
    return 0


def _ready(descriptors: Iterable[int], timeout_s: float) -> None:
    """Wait until one of them is readable, or the time is over."""
    poll = select.poll()
    for fd in descriptors:
        poll.register(fd, select.POLLIN)
    poll.poll(math.ceil(timeout_s * 1000))


class Watcher:
    """The loop. A trouble is told once, and tried again after 1 s, then 2 s, up to a minute."""

    def __init__(
        self,
        session: Session,
        clock: Clock,
        alarm: Alarm,
        ending: Ending,
        *,
        elapsed: Callable[[], float] = time.monotonic,
        rest: Callable[[Iterable[int], float], None] = _ready,
    ) -> None:
        self._session = session
        self._clock = clock
        self._alarm = alarm
        self._ending = ending
        self._elapsed = elapsed
        self._rest = rest
        self._wakers = (ending.fileno(), alarm.fileno())
        self._seen: dict[Key, Seen] | None = None
        self._next_end: float | None = None
        # What is wrong, in the order of telling; each kind of trouble ends by itself.
        self._troubles: dict[_Trouble, str] = {}
        self._failures = 0
        self._is_clock_told = False

    def run(self) -> None:
        """Until the end is asked for; a reconciliation that has begun is finished."""
        while not self._ending.is_asked:
            try:
                with self._session.backend.changes(self._wakers) as changes:
                    self._follow(changes)
            except StoreError as error:
                self._complain(_Trouble.NEWS, f"changes are not noticed for now: {error}")
                self._rest(self._wakers, self._retry_s())
        notify("STOPPING=1")

    def _follow(self, changes: Changes) -> None:
        """Reconcile, wait, and again. Raises `StoreError` when the news is lost."""
        self._reconcile()
        while not self._ending.is_asked:
            timeout_s = None
            if _Trouble.APPLY in self._troubles:
                # What was tried and failed may itself be news, and must not be tried at once again.
                self._rest((self._ending.fileno(),), RETRY_FIRST_S)
                timeout_s = self._retry_s() - RETRY_FIRST_S
            self._set_alarm()
            if changes.wait(timeout_s):
                self._mended(_Trouble.NEWS)
                self._settle(changes)
            if not self._ending.is_asked:
                self._reconcile()

    def _settle(self, changes: Changes) -> None:
        """Let a burst come to its end; one that does not end is cut short."""
        deadline = self._elapsed() + BURST_S
        while (left_s := deadline - self._elapsed()) > 0 and changes.wait(min(QUIET_S, left_s)):
            pass

    def _reconcile(self) -> None:
        now = self._clock.now()
        session = self._session._replace(now=now)
        try:
            with session.backend.locked():
                planned, outcome = session.reconcile()
        except ForwardError as error:
            self._complain(_Trouble.APPLY, str(error))
            return
        self._next_end = next_end(planned, now)
        self._report(planned, outcome, now)
        self._check_clock()
        if outcome.troubles:
            problems = f"not everything could be done: {'; '.join(outcome.troubles)}"
            self._complain(_Trouble.APPLY, problems)
            return
        self._mended(_Trouble.APPLY)
        notify("READY=1", f"STATUS={self._status(planned, now)}")

    def _report(self, planned: Plan, outcome: Outcome, now: float) -> None:
        seen = states(planned)
        news = [] if self._seen is None else list(differing(self._seen, seen))
        self._seen = seen
        if self._session.is_json:
            if outcome.done or outcome.troubles or news:
                steps = [step.as_json() for step in outcome.done]
                data = {"time": now, "news": news, "steps": steps, "problems": list(outcome.troubles)}
                # One object a line, and not session.say_json, which writes for people too.
                self._session.say(f"{json.dumps(data)}\n")
        else:
            words = [word for step in outcome.done for word in step.words()]
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
        self._failures += 1
        is_new = self._troubles.get(trouble) != text
        self._troubles[trouble] = text
        if is_new:
            self._warn(text)
        notify("READY=1", f"STATUS={escaped(text)}")

    def _mended(self, trouble: _Trouble) -> None:
        if self._troubles.pop(trouble, None) is not None and not self._troubles:
            self._failures = 0
            self._warn("all is well again")

    def _warn(self, text: str) -> None:
        for line in text.splitlines():
            self._session.warn(escaped(line))
        self._session.err.flush()

    def _retry_s(self) -> float:
        return float(min(RETRY_MAX_S, RETRY_FIRST_S * 2 ** min(self._failures - 1, 10)))

    def _set_alarm(self) -> None:
        """For the next end of a rule. One that has come while we worked rings at once, unless it is what we
        could not act upon: that is tried again like any trouble.
        """
        end = self._next_end
        if end is None or (_Trouble.APPLY in self._troubles and end <= self._clock.now()):
            self._alarm.set(None)
        else:
            self._alarm.set(end - self._clock.ahead_s())

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
        (f.source.target, f.source.name): Seen(f.state, f.cause, f.reason) for f in planned
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
