# SPDX-License-Identifier: GPL-2.0-or-later
"""News of the system reach the main thread, also after what brings them has failed."""

import select
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from mainloop import MainLoop

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore
from qubes_fwd_qrexec.window.model import news
from qubes_fwd_qrexec.window.model.news import News


class Told:
    def __init__(self) -> None:
        self.changes = 0
        self.errors: list[str] = []

    def changed(self) -> None:
        self.changes += 1

    def failed(self, error: Exception) -> None:
        self.errors.append(str(error))


def test_a_change_is_told_once_the_system_is_followed(lab: LabDirectory) -> None:
    loop, told = MainLoop(), Told()
    found = News(lambda: LabStore(lab), loop.deliver, told.changed, told.failed)
    loop.until(lambda: told.changes == 1)
    lab.set_feature("work", "forward.web", "action=forward")
    loop.until(lambda: told.changes >= 2)
    found.close()
    assert told.errors == []


class Failing:
    """A system that tells nothing, or cannot be followed."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.tries = 0

    @contextmanager
    def changes(self, wakers: Sequence[int]) -> Iterator["Failing"]:
        self.tries += 1
        yield self

    def wait(self, timeout_s: float | None) -> bool:
        raise self._error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (StoreError("qubesd sends no events"), "qubesd sends no events"),
        (KeyError("x"), "a fault of the window"),
    ],
)
def test_what_fails_is_told_and_tried_again(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(news, "RETRY_S", 0.0)
    loop, told, system = MainLoop(), Told(), Failing(error)
    found = News(lambda: system, loop.deliver, told.changed, told.failed)  # type: ignore[arg-type, return-value]
    loop.until(lambda: len(told.errors) == 3)
    found.close()
    assert system.tries >= 3
    assert words in told.errors[0]


def test_closing_does_not_wait_for_the_next_try() -> None:
    loop, told, system = MainLoop(), Told(), Failing(StoreError("no"))
    found = News(lambda: system, loop.deliver, told.changed, told.failed)  # type: ignore[arg-type, return-value]
    loop.until(lambda: told.errors)
    threads = threading.active_count()
    found.close()
    assert threading.active_count() == threads - 1


def test_each_try_comes_twice_as_late_up_to_five_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Select:
        """Waits no time at all, and notes for how long it should."""

        @staticmethod
        def select(fds: list[int], *rest: list[int | float]) -> object:
            waits.append(float(rest[-1]))  # type: ignore[arg-type]
            return select.select(fds, [], [], 0)

    monkeypatch.setattr(news, "select", Select)
    loop, told, system = MainLoop(), Told(), Failing(StoreError("no"))
    found = News(lambda: system, loop.deliver, told.changed, told.failed)  # type: ignore[arg-type, return-value]
    loop.until(lambda: len(told.errors) == 9)
    found.close()
    assert [wait for wait in waits if wait][:8] == [5, 10, 20, 40, 80, 160, 300, 300]
