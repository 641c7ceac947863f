# SPDX-License-Identifier: GPL-2.0-or-later
"""The command status --watch: it looks again until it is told to end."""

import io
import json
import os
import re
import termios
import threading
import time
from argparse import Namespace
from threading import Timer
from typing import Any

import pytest
import schema
from answering import LACKS, Answering
from stages import END
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.views.cli import run
from qubes_fwd_qrexec.admin.views.session import Session
from qubes_fwd_qrexec.admin.views.status import (
    WATCH_S,
    status,
    watch,
)
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore
from qubes_fwd_qrexec.system.ending import Ending


class Looks(Ending):
    """An end that is asked for after some looks; none of them is waited for."""

    def __init__(self, count: int) -> None:
        self._count = count

    def is_asked(self, within_s: float = 0.0) -> bool:
        assert within_s == WATCH_S
        self._count -= 1
        return self._count == 0


ALL = Namespace(qube=[], watch=True, clients=False)
PLAIN = Style()


def session_of(backend: Backend, style: Style = PLAIN, *, is_json: bool = False) -> Session:
    return Session(backend, NOW, {}, io.StringIO(), io.StringIO(), io.StringIO(), style, is_json, set())


def printed(session: Session) -> tuple[str, str]:
    assert isinstance(session.out, io.StringIO)
    assert isinstance(session.err, io.StringIO)
    return session.out.getvalue(), session.err.getvalue()


class Terminal(io.StringIO):
    """An output that is a terminal of some size, and keeps what is written."""

    def __init__(self, columns: int, lines: int) -> None:
        super().__init__()
        self._fds = os.openpty()
        self.resize(columns, lines)

    def resize(self, columns: int, lines: int) -> None:
        termios.tcsetwinsize(self._fds[0], (lines, columns))

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fds[1]

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        super().close()


def test_a_watch_shows_it_again_and_ends_with_the_status_of_the_last_look(
    forward: Command, store: Backend, kind: str
) -> None:
    forward(*ADD)
    session = session_of(store)
    assert watch(ALL, session, Looks(2)) == (kind == "qubes")  # there sys-net is without the package
    out, err = printed(session)
    assert (out.count("QUBE "), out.count("\x1b"), err) == (2, 0, "")


def test_a_watch_has_the_size_that_the_terminal_has_at_each_look(forward: Command, store: Backend) -> None:
    for port in range(80, 90):
        forward("add", "work", str(port), "--from", "192.168.0.0/16")

    class Resized(Looks):
        def is_asked(self, within_s: float = 0.0) -> bool:
            terminal.resize(60, 8)
            return super().is_asked(within_s)

    with Terminal(200, 50) as terminal:
        watch(ALL, session_of(store, Style(200))._replace(out=terminal), Resized(2))
        nothing, first, second = terminal.getvalue().split("\x1b[H")
    assert nothing == ""
    assert "TO CLIENTS" in first
    assert "more line" not in first
    lines = second.replace("\x1b[K", "").removesuffix("\x1b[J").splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) <= 60
    assert re.fullmatch(r"\.\.\. [0-9]+ more lines; 'qvm-forward status' shows all", lines[-1])


def test_a_terminal_without_a_size_gets_all_of_it(forward: Command, store: Backend) -> None:
    forward(*ADD)
    for size in [(0, 0), (0, 24), (80, 0)]:
        with Terminal(*size) as terminal:
            watch(ALL, session_of(store)._replace(out=terminal), Looks(1))
            assert terminal.getvalue().startswith("QUBE  NAME")


@pytest.mark.parametrize("is_watch", [False, True])
def test_whom_a_watch_waits_for_is_not_said_below_what_it_shows(lab: LabDirectory, is_watch: bool) -> None:
    announcing = []

    class Asked(Answering):
        def ask(self, *_: Any, **__: Any) -> bytes:
            announcing.append(any(isinstance(thread, Timer) for thread in threading.enumerate()))
            if is_watch:
                END()
            raise LACKS

    store, argv = Asked(lab, {}), ["status", *["--watch"] * is_watch]
    with Terminal(80, 24) as err:
        more: Any = {"environ": {}, "stdin": io.StringIO(), "out": io.StringIO(), "err": err, "style": PLAIN}
        run(argv, now=NOW, backend=store, **more)
    assert announcing
    assert any(announcing) is not is_watch


def test_colours_take_no_room(forward: Command, store: Backend) -> None:
    for port in range(80, 84):
        forward("add", "work", str(port), "--from", "192.168.0.0/16")
    lines = forward("status").out.splitlines()
    size = max(map(len, lines)), len(lines) + 2
    shown = []
    for style in (Style(), Style(has_colour=True)):
        with Terminal(*size) as terminal:
            watch(ALL, session_of(store, style)._replace(out=terminal), Looks(1))
            shown.append(terminal.getvalue())
    assert "\x1b[3" in shown[1]
    assert re.sub(r"\x1b\[[0-9]+m", "", shown[1]) == shown[0]
    assert "more line" not in shown[0]


def test_a_watch_in_json_has_one_object_a_line_with_its_time(forward: Command, store: Backend) -> None:
    forward(*ADD)
    session = session_of(store, is_json=True)
    begun = time.time()
    watch(ALL, session, Looks(2))
    schema.check(["status", "--watch", "--json"], printed(session)[0])
    first, second = map(json.loads, printed(session)[0].splitlines())
    assert first.keys() == second.keys() == {*forward("status", "--json").json, "time"}
    assert begun <= first["time"] <= second["time"] <= time.time()


@pytest.mark.parametrize("is_json", [False, True])
def test_a_watch_goes_on_after_an_error_and_says_it(
    forward: Command, lab: LabDirectory, is_json: bool
) -> None:
    class Away(LabStore):
        looks = 0

        def inventory(self, *, with_config: bool = True) -> Inventory:
            self.looks += 1
            if self.looks == 1:
                raise StoreError("away")
            return super().inventory(with_config=with_config)

    forward(*ADD, "--disabled")
    forward("apply")
    session = session_of(Away(lab), is_json=is_json)
    assert watch(ALL, session, Looks(2)) == 0
    out, err = printed(session)
    assert (out.count('"due": []') if is_json else out.count("Nothing is open.")) == 1
    assert err == "qvm-forward: away\n"
    session = session_of(Away(lab), is_json=is_json)
    assert (watch(ALL, session, Looks(1)), printed(session)[0]) == (1, "")


def test_a_watch_ends_by_a_signal_once_the_look_is_done(forward: Command, lab: LabDirectory) -> None:
    class Interrupted(LabStore):
        def inventory(self, *, with_config: bool = True) -> Inventory:
            END()
            return super().inventory(with_config=with_config)

    forward(*ADD, "--disabled")
    forward("apply")
    session = session_of(Interrupted(lab))
    assert status(ALL, session) == 0
    assert printed(session)[0].startswith("Nothing is open.\n")
