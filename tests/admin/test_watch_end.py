# SPDX-License-Identifier: GPL-2.0-or-later
"""`watch` ends when it is asked to, and what it tells the service manager."""

import io
import socket
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from stages import END, Stage, set_netvm

from qubes_fwd_qrexec.admin.backend import Changes
from qubes_fwd_qrexec.admin.views.applying import watch
from qubes_fwd_qrexec.admin.views.session import Session
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.admin.watch import RETRY_S
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.lab.store import LabStore


def test_a_wish_to_end_does_not_interrupt_what_has_begun(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.run()
    assert stage.is_open
    replace_policy = LabStore.replace_policy

    def ask_and_replace(self: LabStore, text: str, token: str) -> None:
        END()
        replace_policy(self, text, token)

    monkeypatch.setattr(LabStore, "replace_policy", ask_and_replace)
    set_netvm(stage.lab)
    stage.waits.clear()
    stage.run()
    assert not stage.is_open
    assert stage.waits == []


def test_a_wish_to_end_in_a_burst_or_a_pause_is_obeyed_without_another_look(stage: Stage) -> None:
    stage.trouble = "away"
    stage.on_rest = END
    stage.run()
    assert stage.looks == [0]
    assert stage.rests == [RETRY_S]


def test_the_command_ends_with_status_0(lab: LabDirectory) -> None:
    class Ended(LabStore):
        def changes(self, wakers: Sequence[int] = ()) -> AbstractContextManager[Changes]:
            END()
            return super().changes(wakers)

    streams = io.StringIO(), io.StringIO(), io.StringIO()
    assert watch(Namespace(), Session(Ended(lab), 0.0, {}, *streams, Style(), False, set())) == 0


def test_whether_it_runs_is_known_and_it_runs_once(lab: LabDirectory) -> None:
    seen: list[str | None] = []

    class Looking(LabStore):
        def changes(self, wakers: Sequence[int] = ()) -> AbstractContextManager[Changes]:
            seen.append(self.unwatched())
            with pytest.raises(StoreError, match="another 'qvm-forward watch' is already running"):
                watch(Namespace(), session)
            END()
            return super().changes(wakers)

    store = Looking(lab)
    streams = io.StringIO(), io.StringIO(), io.StringIO()
    session = Session(store, 0.0, {}, *streams, Style(), False, set())
    assert store.unwatched() == "'qvm-forward watch' in another terminal"
    assert watch(Namespace(), session) == 0
    assert seen == [None]
    assert store.unwatched() is not None


def test_the_service_manager_is_told(
    expiring: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        expiring.lab.set_feature("vault", "forward.bad", "x")
        expiring.lab.set_state("personal", QubeState.HALTED)
        expiring.trouble = "away\nfor now"

        def mend() -> None:
            expiring.trouble = None

        expiring.on_rest = mend
        expiring.run()
        told = []
        manager.setblocking(False)
        while not told or told[-1] != "STOPPING=1":
            told.append(manager.recv(65536).decode())
    assert told[0] == "READY=1\nSTATUS=away\\nfor now"
    assert told[1].startswith("READY=1\nSTATUS=1 of 2 forwards open; the next ends 2027-")
