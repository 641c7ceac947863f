# SPDX-License-Identifier: GPL-2.0-or-later
"""What only the backend over a lab's directory does; see test_backend.py for the rest."""

import socket
from pathlib import Path

import pytest
import trio

from qubes_fwd_qrexec.admin.answers import AnswerError, NotRunningError
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.services import STATUS_SERVICE
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.lab.running import open_lab
from qubes_fwd_qrexec.lab.store import LabStore

WORK = QubeName("work")


@pytest.fixture
def lab(tmp_path: Path) -> LabDirectory:
    return create_lab(tmp_path / "lab")


@pytest.fixture
def store(lab: LabDirectory) -> Backend:
    return LabStore(lab)


def test_a_lock_that_cannot_be_taken_is_a_store_error(store: Backend, lab: LabDirectory) -> None:
    with store.locked():
        pass
    lab.root.rename(lab.root.with_name("away"))
    with pytest.raises(StoreError, match=f"{lab.root}: No such file or directory"), store.locked():
        pass


def test_what_cannot_be_read_is_named_once(store: Backend, lab: LabDirectory) -> None:
    path = lab.policy_dir / "30-forward.policy"
    path.mkdir()
    with pytest.raises(StoreError) as raised:
        store.read_policy()
    assert str(raised.value) == f"{path}: Is a directory"
    qube = lab.qube_dir("work").file
    qube.unlink()
    qube.mkdir()
    assert store.inventory().qubes[WORK].problem == f"{qube}: Is a directory"


LONG_S = 60.0
"""A busy machine takes seconds to start a service."""


def test_in_a_lab_that_is_down_nothing_runs(store: Backend, lab: LabDirectory) -> None:
    with pytest.raises(NotRunningError, match="the lab is down; 'qvm-forward-lab up' starts it"):
        store.ask(WORK, ASK, 5)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left_behind:
        left_behind.bind(str(lab.qube_dir("dom0").agent_socket))
    with pytest.raises(NotRunningError):
        store.ask(WORK, ASK, 5)


async def test_a_call_of_dom0_is_made_without_policy_and_gets_what_it_is_given(
    store: Backend, lab: LabDirectory
) -> None:
    async with open_lab(lab.root):
        service = lab.qube_dir("work").service_dirs[0] / "test.Service"
        service.write_text('#!/bin/sh\necho "$QREXEC_REMOTE_DOMAIN $1"; cat\n')
        service.chmod(0o755)
        given = "x" * 60_000
        said = await trio.to_thread.run_sync(store.ask, WORK, "test.Service+a", 65536, LONG_S, given)
    assert said == f"dom0 a\n{given}".encode()


@pytest.mark.parametrize(("script", "status"), [("exit 1", 1), ("exit 125", 125), ("exit 2", 2)])
async def test_a_call_that_ends_badly_says_how(
    store: Backend, lab: LabDirectory, script: str, status: int
) -> None:
    """Also one that reads nothing of what it is given."""
    older = (
        (", because it does not understand the request: its package is older than dom0's")
        if status == 2
        else ""
    )
    async with open_lab(lab.root):
        service = lab.qube_dir("work").service_dirs[0] / "test.Service"
        service.write_text(f"#!/bin/sh\n{script}\n")
        service.chmod(0o755)
        with pytest.raises(AnswerError, match=rf"in work ended with exit status {status}{older}$") as caught:
            await trio.to_thread.run_sync(store.ask, WORK, "test.Service", 5, LONG_S, "given")
    assert caught.value.status == status


ASK = f"{STATUS_SERVICE}+"


async def test_an_answer_of_a_qube_is_read(store: Backend, lab: LabDirectory) -> None:
    async with open_lab(lab.root):
        service = lab.qube_dir("work").service_dirs[0] / STATUS_SERVICE
        service.write_text("#!/bin/sh\nprintf 12345\n")
        service.chmod(0o755)
        assert await trio.to_thread.run_sync(store.ask, WORK, ASK, 5, LONG_S) == b"12345"
        with pytest.raises(AnswerError, match=r"in work said more than 4 bytes$"):
            await trio.to_thread.run_sync(store.ask, WORK, ASK, 4, LONG_S)
        with pytest.raises(AnswerError, match="exit status 127") as caught:
            await trio.to_thread.run_sync(store.ask, QubeName("personal"), ASK, 5, LONG_S)
        assert caught.value.status == 127


async def test_a_qube_that_never_answers_is_given_up(store: Backend, lab: LabDirectory) -> None:
    async with open_lab(lab.root) as running:
        for patience in (1, 2):
            running.turn(hang=("work",), patience=patience)
            with pytest.raises(AnswerError, match=rf"in work did not end within 0\.{patience} s$"):
                await trio.to_thread.run_sync(store.ask, WORK, ASK, 5, 0.1)


async def test_a_halted_qube_is_not_started_by_a_call(store: Backend, lab: LabDirectory) -> None:
    lab.set_state("work", QubeState.HALTED)
    async with open_lab(lab.root):
        with pytest.raises(StoreError, match="exit status 126"):
            await trio.to_thread.run_sync(store.ask, WORK, ASK, 5, LONG_S)
    assert not lab.qube("work").is_running
