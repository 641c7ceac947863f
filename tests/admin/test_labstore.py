# SPDX-License-Identifier: GPL-2.0-or-later
"""What only the backend over a lab's directory does; see test_backend.py for the rest."""

import socket
from pathlib import Path

import pytest
import trio

from qubes_fwd_qrexec.admin import answers, labstore
from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.labstore import LabStore
from qubes_fwd_qrexec.config import REVOKE_SERVICE, STATUS_SERVICE
from qubes_fwd_qrexec.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.lab.running import open_lab
from qubes_fwd_qrexec.values import QubeName

WORK = QubeName("work")


@pytest.fixture
def store(lab: LabDirectory) -> Backend:
    return LabStore(lab)


def test_a_lock_that_cannot_be_taken_is_a_store_error(store: Backend, lab: LabDirectory) -> None:
    with store.locked():
        pass
    lab.lock_file.unlink()
    lab.lock_file.mkdir()
    with pytest.raises(StoreError, match="Is a directory"), store.locked():
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
    with pytest.raises(StoreError) as raised:
        store.inventory()
    assert str(raised.value) == f"{qube}: Is a directory"


@pytest.fixture(autouse=True)
def _long_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes seconds to start a service."""
    monkeypatch.setattr(labstore, "_CALL_TIMEOUT_S", 60.0)
    monkeypatch.setattr(answers.read_answer, "__defaults__", (60.0,))


SERVICE = f"{REVOKE_SERVICE}+80-80+sys-net"


def test_a_lab_that_is_down_has_nothing_to_call(store: Backend, lab: LabDirectory) -> None:
    store.call(WORK, SERVICE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left_behind:
        left_behind.bind(str(lab.qube_dir("dom0").agent_socket))
    store.call(WORK, SERVICE)


async def test_a_call_of_dom0_is_made_without_policy_and_its_end_awaited(
    store: Backend, lab: LabDirectory, tmp_path: Path
) -> None:
    said = tmp_path / "said"
    async with open_lab(lab.root):
        service = lab.qube_dir("work").service_dirs[0] / "test.Service"
        service.write_text(f'#!/bin/sh\necho "$QREXEC_REMOTE_DOMAIN $1" >{said}\n')
        service.chmod(0o755)
        await trio.to_thread.run_sync(store.call, WORK, "test.Service+a")
    assert said.read_text() == "dom0 a\n"


async def test_a_target_without_the_service_has_no_tunnels_and_that_is_well(
    store: Backend, lab: LabDirectory
) -> None:
    async with open_lab(lab.root):
        await trio.to_thread.run_sync(store.call, QubeName("personal"), SERVICE)


@pytest.mark.parametrize(("script", "status"), [("exit 1", 1), ("exit 125", 125)])
async def test_a_call_that_ends_badly_is_a_store_error(
    store: Backend, lab: LabDirectory, script: str, status: int
) -> None:
    async with open_lab(lab.root):
        service = lab.qube_dir("work").service_dirs[0] / REVOKE_SERVICE
        service.write_text(f"#!/bin/sh\n{script}\n")
        service.chmod(0o755)
        with pytest.raises(StoreError, match=rf"in work ended with exit status {status}$"):
            await trio.to_thread.run_sync(store.call, WORK, SERVICE)


async def test_a_target_that_is_older_than_dom0_is_named(store: Backend, lab: LabDirectory) -> None:
    """Its service is the real one; what it is asked is what a later release may ask."""
    words = r"exit status 2, as it does not understand that; its package in work's template is older"
    async with open_lab(lab.root):
        with pytest.raises(StoreError, match=words):
            await trio.to_thread.run_sync(store.call, WORK, f"{REVOKE_SERVICE}+80-80+sys-net+drain+later")


async def test_a_call_that_does_not_end_is_given_up(
    store: Backend, lab: LabDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labstore, "_CALL_TIMEOUT_S", 0.2)
    async with open_lab(lab.root) as running:
        running.turn(hang=("work",))
        with pytest.raises(StoreError, match=r"in work did not end within 0\.2 s$"):
            await trio.to_thread.run_sync(store.call, WORK, SERVICE)


ASK = f"{STATUS_SERVICE}+"


async def test_an_answer_of_a_qube_is_read(store: Backend, lab: LabDirectory) -> None:
    async with open_lab(lab.root):
        service = lab.qube_dir("work").service_dirs[0] / STATUS_SERVICE
        service.write_text("#!/bin/sh\nprintf 12345\n")
        service.chmod(0o755)
        assert await trio.to_thread.run_sync(store.ask, WORK, ASK, 5) == b"12345"
        with pytest.raises(AnswerError, match=r"in work said more than 4 bytes$"):
            await trio.to_thread.run_sync(store.ask, WORK, ASK, 4)
        with pytest.raises(AnswerError, match="exit status 127") as caught:
            await trio.to_thread.run_sync(store.ask, QubeName("personal"), ASK, 5)
        assert caught.value.status == 127


async def test_a_qube_that_never_answers_is_given_up(
    store: Backend, lab: LabDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers.read_answer, "__defaults__", (0.2,))
    async with open_lab(lab.root) as running:
        running.turn(hang=("work",))
        with pytest.raises(AnswerError, match=r"in work did not end within 0\.2 s$"):
            await trio.to_thread.run_sync(store.ask, WORK, ASK, 5)


def test_a_lab_that_is_down_has_nobody_to_ask(store: Backend) -> None:
    with pytest.raises(AnswerError, match="the lab is down; 'qvm-forward-lab up' starts it"):
        store.ask(WORK, ASK, 5)


async def test_a_halted_qube_is_not_started_by_a_call(store: Backend, lab: LabDirectory) -> None:
    lab.set_state("work", QubeState.HALTED)
    async with open_lab(lab.root):
        with pytest.raises(StoreError, match="exit status 126"):
            await trio.to_thread.run_sync(store.call, WORK, SERVICE)
    assert not lab.qube("work").is_running
