# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab for the loop of `watch`: real news, and a wait that would last ends by the next act of a script."""

import io
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from worlds import Hands

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import Changes
from qubes_fwd_qrexec.admin.clock import Alarm
from qubes_fwd_qrexec.admin.ending import Ending
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.labstore import LabStore
from qubes_fwd_qrexec.admin.render import Style
from qubes_fwd_qrexec.admin.session import Session
from qubes_fwd_qrexec.admin.watch import (
    Watcher,
)
from qubes_fwd_qrexec.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.values import QubeName

Act = Callable[[], object]
END: Act = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
CONFIG = "vm-config.fwd.work.web"


class SilentAlarm(Alarm):
    """An alarm that remembers what it was set to, and never rings."""

    def __init__(self) -> None:
        super().__init__()
        self.wall: float | None = None

    def set(self, wall: float | None) -> None:
        self.wall = wall


class Played:
    """The news of a lab; where nothing would come, the next act is played, and at last SIGTERM."""

    def __init__(self, stage: "Stage", inner: Changes) -> None:
        self._stage = stage
        self._inner = inner

    def wait(self, timeout_s: float | None) -> bool:
        stage = self._stage
        stage.waits.append(timeout_s)
        stage.alarms_at_waits.append(stage.alarm.wall)
        if stage.news_trouble is not None:
            raise StoreError(stage.news_trouble)
        if self._inner.wait(0):
            return True
        if timeout_s is None:
            stage.play()
            return self._inner.wait(0)
        return False


class Stage(LabStore):
    """A lab as the backend of a `Watcher`, with the time in the test's hands.

    ``looks`` has one entry for each look at the inventory, the number of acts that had been played by then.
    """

    def __init__(self, lab: LabDirectory) -> None:
        super().__init__(lab)
        self.lab = lab
        self.hands = Hands()
        self.looks: list[int] = []
        self.waits: list[float | None] = []
        self.alarms_at_waits: list[float | None] = []
        self.rests: list[float] = []
        self.news_trouble: str | None = None
        self.trouble: str | None = None
        self.on_rest: Act = lambda: None
        self.out, self.err = io.StringIO(), io.StringIO()
        self.alarms: list[float | None] = []
        self._acts: list[Act] = []
        self._played = 0
        self.alarm: SilentAlarm

    def inventory(self, *, with_config: bool = True) -> Inventory:
        self.looks.append(self._played)
        if self.trouble is not None:
            raise StoreError(self.trouble)
        return super().inventory(with_config=with_config)

    def changes(self, wakers: Sequence[int] = ()) -> "PlayedContext":
        assert len(wakers) == 2
        return PlayedContext(self, super().changes(wakers))

    def play(self) -> None:
        self.alarms.append(self.alarm.wall)
        self._played += 1
        (self._acts.pop(0) if self._acts else END)()

    def _rest(self, descriptors: Iterable[int], timeout_s: float) -> None:
        self.rests.append(timeout_s)
        self.hands.pass_by(timeout_s)
        self.on_rest()

    def run(self, *acts: Act, is_json: bool = False) -> None:
        """Watch until all acts have been played and nothing is left to be done."""
        self._acts = list(acts)
        session = Session(self, 0.0, {}, io.StringIO(), self.out, self.err, Style(), is_json)
        with Ending() as ending, SilentAlarm() as alarm:
            self.alarm = alarm
            Watcher(
                session,
                self.hands.clock(),
                alarm,
                ending,
                elapsed=lambda: self.hands.elapsed,
                rest=self._rest,
            ).run()

    @property
    def is_open(self) -> bool:
        """In policy and at the listener alike."""
        is_allowed = bool(policy.allowing(self.read_policy().text or ""))
        assert is_allowed == (CONFIG in self.lab.features("sys-net"))
        return is_allowed


class PlayedContext(AbstractContextManager[Played]):
    def __init__(self, stage: Stage, inner: AbstractContextManager[Changes]) -> None:
        self._stage = stage
        self._inner = inner

    def __enter__(self) -> Played:
        return Played(self._stage, self._inner.__enter__())

    def __exit__(self, *_: object) -> None:
        self._inner.__exit__(None, None, None)


def set_netvm(lab: LabDirectory, netvm: str | None = None) -> None:
    lab.write_qube(replace(lab.qube("work"), netvm=None if netvm is None else QubeName(netvm)))
