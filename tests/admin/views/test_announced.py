# SPDX-License-Identifier: GPL-2.0-or-later
"""Whom a command waits for, and what it asks."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import pytest
from bounds import BOUND_S
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.hold import hold
from qubes_fwd_qrexec.admin.views.announced import Announced


class Late:
    """A backend whose lock and whose qubes keep a command waiting until it has said so."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.is_said = threading.Event()

    def say(self, text: str) -> None:
        self.said.append(text)
        self.is_said.set()

    def ask(self, *_: object) -> bytes:
        assert self.is_said.wait(BOUND_S)
        return b"answer"

    @contextmanager
    def locked(self) -> Iterator[None]:
        assert self.is_said.wait(BOUND_S)
        yield


def _ask(backend: Backend) -> object:
    return backend.ask("sys-net", "qubes.ForwardStatus+", 10)  # type: ignore[arg-type]


def _lock(backend: Backend) -> object:
    lock: AbstractContextManager[None] = backend.locked()
    with lock:
        return None


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (_ask, "waits for sys-net (qubes.ForwardStatus+, at most 8 s)"),
        (_lock, "waits for another qvm-forward, which is changing something"),
    ],
)
def test_a_command_says_whom_it_waits_for(does: Callable[[Backend], object], said: str) -> None:
    late = Late()
    does(cast(Any, Announced(cast(Any, late), late.say, is_verbose=False)))
    assert late.said == [said]


def test_one_line_names_all_that_are_waited_for_at_once() -> None:
    late = Late()
    backend = Announced(cast(Any, late), late.say, is_verbose=False)
    asked = [f"q{number}" for number in range(5)]
    threads = [threading.Thread(target=backend.ask, args=(qube, "s", 10, 2.0)) for qube in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    assert len(late.said) == 1
    assert re.fullmatch(r"waits for q[0-4] \(s, at most 2 s\)(, .*)?( and [0-9] more)?", late.said[0])


def test_a_reader_who_is_gone_keeps_nothing_from_being_done(store: Backend) -> None:
    """As when the window that started panic has been closed."""

    def say(_: str) -> None:
        raise BrokenPipeError

    announced = cast("Backend", Announced(store, say, is_verbose=True))
    assert hold(announced, NOW).problems == ()
    assert policy.is_held(store.read_policy().text)


def test_verbose_says_what_is_asked_of_whom(forward: Command) -> None:
    err = forward(*ADD, "-v").err
    assert "qvm-forward: sets feature forward.web of work\n" in err
    assert "qvm-forward: writes dom0's policy\n" in err
    assert forward("add", "work", "81", "--from", "any").err == ""


def test_quiet_leaves_out_what_a_change_did_and_no_more(forward: Command) -> None:
    assert forward(*ADD, "-q").out == ""
    assert "web" in forward("list", "-q").out
    assert forward("apply", "-q").out == ""
    assert "Nothing to change" in forward("apply", "-q", "--dry-run").out
    refused = forward("remove", "work", "nope", "-q")
    assert (refused.status, refused.err != "") == (1, True)
