# SPDX-License-Identifier: GPL-2.0-or-later
"""What the window knows: the last look at the system and the last figures, and who is told when they change.

It belongs to the main thread. What takes time is done by four workers: one looks, one changes, one computes,
and one asks qubes. In a management qube a look at many qubes takes seconds, and so may a qube's answer.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.watch import next_end

from . import figures
from .figures import Figures
from .look import Look, look_at
from .news import News
from .rows import SOON_S
from .words import _
from .worker import Deliver, OpenBackend, Worker

T = TypeVar("T")
Later = Callable[[float, Callable[[], None]], Callable[[], None]]
"""Has the main thread call a function after some seconds; returns what cancels that."""
# A look at a large system takes some seconds; a qubesd that hangs never answers, and qubesadmin waits for it.
LOOK_TIMEOUT_S = 30.0
# Each question calls every qube that listens.
FIGURES_S = 5.0
# After the first look, whose rules are being shown: many threads that hear answers would hinder that.
FIRST_FIGURES_S = 1.0
# How often times such as "in 2 h" are told anew, and how often while something ends within `SOON_S`.
TICK_S = 60.0
SOON_TICK_S = 1.0


class Board:
    """The last look and the last figures, None until there are any.

    ``trouble`` says why what is here may be old: the last look failed or takes too long, or no news come.
    """

    def __init__(
        self,
        open_backend: OpenBackend,
        deliver: Deliver,
        later: Later,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.look: Look | None = None
        self.figures: Figures | None = None
        self._open_backend = open_backend
        self._deliver = deliver
        self._later = later
        self._clock = clock
        self._no_look: str | None = None
        self._no_news: str | None = None
        self._looks = 0
        self._cancel_timeout: Callable[[], None] | None = None
        self._told: list[Callable[[], None]] = []
        self._is_seen = self._is_asking = False
        self._asked_at: float | None = None
        self._looking, self._changing, self._computing, self._asking = (
            Worker(open_backend, deliver) for _ in range(4)
        )
        self._news: News | None = None
        self._cancel_tick: Callable[[], None] = lambda: None

    @property
    def now(self) -> float:
        """UNIX seconds."""
        return self._clock()

    @property
    def trouble(self) -> str | None:
        return self._no_look or self._no_news

    def subscribe(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Have ``changed`` called after each look and all figures, in trouble, and as time passes.

        Returns what ends that.
        """
        self._told.append(changed)
        return lambda: self._told.remove(changed)

    def start(self) -> None:
        """Look, and follow the system from now on."""
        self._news = News(self._open_backend, self._deliver, self._heard, self._heard_nothing)
        self.refresh()
        self._tick()

    def refresh(self) -> None:
        """Look at the system anew."""
        known = None if self.look is None else self.look.plan
        self._looks += 1
        number = self._looks
        if self._cancel_timeout is None:
            self._expect_look()

        def looked(look: Look) -> None:
            self._heard_of_look(number)
            self._looked(look)

        def not_looked(error: Exception) -> None:
            self._heard_of_look(number)
            self._not_looked(str(error))

        self._looking.do(
            lambda backend: look_at(backend, self._clock(), known), looked, not_looked, kind="look"
        )

    def be_seen(self, is_seen: bool) -> None:
        """Whether the window is seen: only then are qubes asked for figures."""
        if is_seen and not self._is_seen:
            self._is_seen = True
            self._tick()
            self._tell()
            self._check_watch()
            self._ask_figures()
        self._is_seen = is_seen

    def change(
        self, job: Callable[[Backend], T], done: Callable[[T], None], failed: Callable[[Exception], None]
    ) -> None:
        """Change the system. Begun, it is finished whatever becomes of the window. Then comes a new look."""

        def changed(result: T) -> None:
            done(result)
            self.refresh()

        def not_changed(error: Exception) -> None:
            failed(error)
            self.refresh()

        self._changing.do(job, changed, not_changed)

    def compute(
        self,
        job: Callable[[], T],
        done: Callable[[T], None],
        failed: Callable[[Exception], None],
        *,
        kind: str,
    ) -> None:
        """Compute what takes time; of each ``kind`` only the last that was asked for, if it has not begun."""
        self._computing.do(lambda _: job(), done, failed, kind=kind)

    def ask(
        self, job: Callable[[Backend], T], done: Callable[[T], None], failed: Callable[[Exception], None]
    ) -> None:
        """Ask qubes something."""
        self._asking.do(job, done, failed)

    def close(self, *, waits: bool = True, ended: Callable[[], None] = lambda: None) -> None:
        """End all, if it ``waits`` after a change that has begun. When that is done the main thread calls
        ``ended``.
        """
        self._cancel_tick()
        if self._news is not None:
            self._news.close()
        for worker in (self._looking, self._computing, self._asking):
            worker.close(waits=False)
        self._changing.close(waits=waits, ended=ended)

    def _tell(self) -> None:
        for changed in tuple(self._told):
            changed()

    def _looked(self, look: Look) -> None:
        is_first = self.look is None
        self.look, self._no_look = look, None
        self._tick()
        self._tell()
        if is_first:
            self._later(FIRST_FIGURES_S, self._ask_figures)

    def _not_looked(self, why: str) -> None:
        self._no_look = why
        self._tell()

    def _expect_look(self) -> None:
        """Say so if no look is done in time. It is still awaited."""
        why = _("the qubes have not been read within {seconds} s; if qubesd hangs, restart it").format(
            seconds=int(LOOK_TIMEOUT_S)
        )
        self._cancel_timeout = self._later(LOOK_TIMEOUT_S, lambda: self._not_looked(why))

    def _heard_of_look(self, number: int) -> None:
        if self._cancel_timeout is not None:
            self._cancel_timeout()
            self._cancel_timeout = None
        if number != self._looks:
            self._expect_look()  # another has been asked for meanwhile

    def _heard(self) -> None:
        self._no_news = None
        self.refresh()

    def _heard_nothing(self, error: Exception) -> None:
        """Look once more when the first one fails: the same may be wrong with everything."""
        was, self._no_news = self._no_news, str(error)
        if was is None:
            self.refresh()
        else:
            self._tell()

    def _tick(self) -> None:
        """Notice that a rule has ended, and come again."""
        self._cancel_tick()
        left_s = self._look_at_end()
        self._cancel_tick = self._later(SOON_TICK_S if 0 < left_s <= SOON_S else TICK_S, self._ticked)

    def _look_at_end(self) -> float:
        """Look anew if a rule has ended since the last look. Returns the seconds to the next end."""
        end, now = None, self._clock()
        if self.look is not None:
            end = next_end(self.look.plan, self.look.now)
            if end is not None and end <= now:
                self.refresh()
        return TICK_S if end is None else end - now

    def _ticked(self) -> None:
        self._tick()
        if self._is_seen:
            self._check_watch()
            self._tell()

    def _check_watch(self) -> None:
        """Look anew where `watch` was started or has ended, which no news tell."""
        look = self.look

        def answered(start: str | None) -> None:
            if look is not None and look is self.look and start != look.watch_start:
                self.refresh()

        self._looking.do(lambda backend: backend.unwatched(), answered, lambda _: None, kind="watch")

    def _ask_figures(self) -> None:
        look, now = self.look, time.monotonic()
        is_early = self._asked_at is not None and now < self._asked_at + FIGURES_S
        if look is None or not self._is_seen or self._is_asking or is_early:
            return
        self._is_asking, self._asked_at = True, now
        self.ask(lambda backend: figures.ask(backend, look, self._clock()), self._answered, self._no_answer)

    def _answered(self, found: Figures) -> None:
        self.figures = found
        self._tell()
        self._ask_again()

    def _no_answer(self, error: Exception) -> None:
        self.figures = None
        self._tell()
        self._ask_again()

    def _ask_again(self) -> None:
        # While the machine sleeps no tick comes, and the next one may take a minute.
        self._look_at_end()
        self._is_asking = False
        self._later(FIGURES_S, self._ask_figures)
