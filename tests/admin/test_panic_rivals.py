# SPDX-License-Identifier: GPL-2.0-or-later
"""The command panic while others change things, and qubes do not answer."""

import fcntl
import io
from threading import Barrier

import pytest
from faulty import CONTESTED, REVOKE, TRY, Faulty, Panic, allowed, due
from worlds import NOW, Command

from qubes_fwd_qrexec.admin.backend import HungError
from qubes_fwd_qrexec.admin.labstore import LabStore
from qubes_fwd_qrexec.admin.session import Session
from qubes_fwd_qrexec.admin.tables import Style
from qubes_fwd_qrexec.errors import StoreError
from qubes_fwd_qrexec.lab import directory
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.values import QubeName


def test_while_somebody_else_has_the_lock_tunnels_are_ended_before_it_is_waited_for(
    opened: LabDirectory, panic: Panic
) -> None:
    backend = Faulty(opened, TRY)
    assert panic(backend).status == 0
    assert backend.log == CONTESTED


@pytest.mark.parametrize("is_hung", [False, True])
def test_watch_opens_nothing_while_panic_goes_on(opened: LabDirectory, panic: Panic, is_hung: bool) -> None:
    """Whenever the lock is free, watch has seen that policy changed, and takes it up."""
    seen: list[tuple[str, int]] = []

    def play_watch(entry: str) -> None:
        seen.append((entry, len(allowed(opened))))
        if opened_again(opened):
            seen.append(("watch", len(allowed(opened))))

    backend = Faulty(opened, *(["call"] if is_hung else []), before=play_watch)
    assert panic(backend).status == (1 if is_hung else 0)
    # It may come before us to the lock, and opens nothing after our first write.
    assert [entry for entry in seen if entry[0] == "watch"] == [("watch", 2), ("watch", 2), ("watch", 0)]
    assert [entry for entry, _ in seen].index(TRY) == 4
    assert {count for entry, count in seen[8:]} == {0}
    assert opened_again(opened)
    assert allowed(opened) == frozenset()


def opened_again(lab: LabDirectory) -> bool:
    """What watch does, if it can have the lock."""
    store = LabStore(lab)
    session = Session(store, NOW, {}, io.StringIO(), io.StringIO(), io.StringIO(), Style(), False)
    try:
        with store.locked(0):
            session.reconcile()
            return True
    except StoreError:
        return False


def test_what_is_opened_under_another_lock_before_the_rules_are_disabled_is_closed_again(
    opened: LabDirectory, panic: Panic
) -> None:
    """By an older release in a management qube, which has a lock of its own and does not heed our note."""
    path = opened.policy_dir / "30-forward.policy"
    text = path.read_text()

    def interfere(entry: str) -> None:
        if entry == "set personal forward.tcp-81":
            path.write_text(text)
            opened.set_feature("sys-net", "vm-config.fwd.work.late", "version=1")

    backend = Faulty(opened, before=interfere)
    assert panic(backend).status == 0
    assert allowed(opened) == frozenset()
    assert opened.vm_config("sys-net") == {}
    assert backend.log.count(REVOKE) == 2


def test_targets_that_do_not_answer_are_called_at_once_and_each_once(
    opened: LabDirectory, panic: Panic, forward: Command
) -> None:
    forward("add", "work", "82", "--from", "any")
    forward("add", "vault", "83", "--from", "any", "--via", "sys-net")
    opened.set_state("vault", QubeState.RUNNING)
    together = Barrier(2, timeout=30)

    class Hung(Faulty):
        def call(self, qube: QubeName, service: str) -> None:
            super().call(qube, service)
            together.wait()
            raise HungError(f"{service} in {qube} did not end within 5 s")

    backend = Hung(opened)
    result = panic(backend)
    assert result.status == 1
    calls = [entry for entry in backend.log if entry.startswith("call")]
    assert sorted(calls[:2]) == sorted(calls[2:])
    assert len({entry.split()[1] for entry in calls[:2]}) == 2
    assert "work: end the tunnels of sys-net to port 82: work was not called for it" in result.err
    assert len(due(opened)) == 3


def test_a_policy_that_others_change_meanwhile_is_closed(opened: LabDirectory, panic: Panic) -> None:
    """Somebody who has the lock writes what he meant to write before panic got the lock."""
    path = opened.policy_dir / "30-forward.policy"
    text = path.read_text()

    def interfere(entry: str) -> None:
        if entry == "lock":
            path.write_text(text)

    backend = Faulty(opened, TRY, before=interfere)
    assert panic(backend).status == 0
    assert allowed(opened) == frozenset()
    # A tunnel may have been opened in between.
    assert backend.log.count(REVOKE) == 2


def test_what_is_opened_after_the_last_write_is_seen(opened: LabDirectory, panic: Panic) -> None:
    path = opened.policy_dir / "30-forward.policy"
    text = path.read_text()

    def interfere(entry: str) -> None:
        if entry == "read":
            path.write_text(text)

    result = panic(Faulty(opened, before=interfere))
    assert result.status == 1
    assert "still open: policy: qubes.ForwardTCP +8080+tunnel sys-net work allow" in result.err


def test_a_lock_that_is_held_is_not_waited_for_long(
    opened: LabDirectory, panic: Panic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_LOCK_TIMEOUT_S", 0.0)
    with open(opened.lock_file, "a", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = panic(Faulty(opened))
    assert result.status == 0
    assert "note: this went on without the lock: " in result.err
    assert allowed(opened) == frozenset()
    assert opened.vm_config("sys-net") == {}
