# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab for the loop of `watch`: real news, and a wait that would last ends by the next act of a script."""

import io
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from worlds import Hands

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import Changes
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.views.applying import follow
from qubes_fwd_qrexec.admin.views.session import Session
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.admin.watch import QUIET_S, TICK_S
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore
from qubes_fwd_qrexec.system.ending import Ending

Act = Callable[[], object]
END: Act = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
CONFIG = "vm-config.fwd.work.web"


class Played:
    """The news of a lab; where nothing would come, the next act is played, and at last SIGTERM."""

    def __init__(self, stage: "Stage", inner: Changes) -> None:
        self._stage = stage
        self._inner = inner
        self._is_settling = False

    def wait(self, timeout_s: float | None) -> bool:
        stage = self._stage
        assert timeout_s is not None
        assert 0 <= timeout_s <= TICK_S
        stage.waits.append(timeout_s)
        if stage.news_trouble is not None:
            raise StoreError(stage.news_trouble)
        was_settling, self._is_settling = self._is_settling, self._inner.wait(0)
        if self._is_settling or was_settling:
            return self._is_settling
        if timeout_s > QUIET_S:
            stage.play()
            self._is_settling = self._inner.wait(0)
        else:
            stage.hands.pass_by(timeout_s)
        return self._is_settling


class Stage(LabStore):
    """A lab as the backend of `watch`, with the time in the test's hands.

    ``looks`` has one entry for each look at the inventory, the number of acts that had been played by then.
    """

    def __init__(self, lab: LabDirectory) -> None:
        super().__init__(lab, lock_timeout_s=0.0)
        self.lab = lab
        self.hands = Hands()
        self.looks: list[int] = []
        self.waits: list[float] = []
        self.rests: list[float] = []
        self.news_trouble: str | None = None
        self.trouble: str | None = None
        self.on_rest: Act = lambda: None
        self.out, self.err = io.StringIO(), io.StringIO()
        self._acts: list[Act] = []
        self._played = 0

    def inventory(self, *, with_config: bool = True) -> Inventory:
        self.looks.append(self._played)
        if self.trouble is not None:
            raise StoreError(self.trouble)
        return super().inventory(with_config=with_config)

    def changes(self, wakers: Sequence[int] = ()) -> "PlayedContext":
        assert len(wakers) == 1
        return PlayedContext(self, super().changes(wakers))

    def play(self) -> None:
        self._played += 1
        (self._acts.pop(0) if self._acts else END)()

    def run(self, *acts: Act, is_json: bool = False) -> None:
        """Watch until all acts have been played and nothing is left to be done."""
        self._acts = list(acts)
        session = Session(self, 0.0, {}, io.StringIO(), self.out, self.err, Style(), is_json, set())
        with Resting(self) as ending:
            follow(session, self.hands.clock(), ending)

    @property
    def is_open(self) -> bool:
        """In policy and at the listener alike."""
        is_allowed = bool(policy.allowing(self.read_policy().text or ""))
        assert is_allowed == (CONFIG in self.lab.features("sys-net"))
        return is_allowed


class Resting(Ending):
    """A wish to end that is not waited for: the time of a stage passes by."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def is_asked(self, within_s: float = 0.0) -> bool:
        if within_s:
            self._stage.rests.append(within_s)
            self._stage.hands.pass_by(within_s)
            self._stage.on_rest()
        return super().is_asked()


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
