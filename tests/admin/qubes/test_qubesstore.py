# SPDX-License-Identifier: GPL-2.0-or-later
"""What only the backend over a Qubes system does; see test_backend.py for the rest."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from bounds import BOUND_S
from fake_admin import Called, FakeApp, FakeQubes, empty_answer, install
from fake_policy import FakePolicyClient
from fake_process import FakeProcess
from worlds import ADD, Command

from qubes_fwd_qrexec.admin.answers import AnswerError, NotRunningError, at_once
from qubes_fwd_qrexec.admin.backend import PolicyCall
from qubes_fwd_qrexec.admin.qubes.store import QubesStore
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.services import REVOKE_SERVICE, STATUS_SERVICE
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.policytext import PolicyRule
from qubes_fwd_qrexec.lab.qube import QubeState

WORK = QubeName("work")
SERVICE = REVOKE_SERVICE


@pytest.fixture
def store(dom0: FakeQubes) -> QubesStore:
    return QubesStore(dom0.root)


ANSWER = b"version=1 ended=1 draining=0\n"


def call(store: QubesStore) -> bytes:
    return store.ask(WORK, SERVICE, 100, 5.0, "version=1\n")


def test_a_call_gets_what_it_is_given_and_its_end_is_awaited(store: QubesStore, dom0: FakeQubes) -> None:
    assert call(store) == ANSWER
    assert dom0.services == [(WORK, SERVICE)]
    assert dom0.process is not None
    assert (dom0.process.is_killed, dom0.process.given) == (False, b"version=1\n")


def test_a_call_in_dom0_needs_no_qubesd_where_the_qubes_daemon_is(store: QubesStore, dom0: FakeQubes) -> None:
    (dom0.root / "run/qubes/qrexec.work").touch()
    client = dom0.root / "usr/bin/qrexec-client"
    client.parent.mkdir(parents=True)
    client.write_text("#!/bin/sh\ncat\nprintf '%s|' \"$@\"\n")
    client.chmod(0o755)
    assert call(store) == b"version=1\n-d|work|user:QUBESRPC qubes.ForwardRevoke dom0|"
    client.unlink()
    with pytest.raises(AnswerError, match=r"^qubes\.ForwardRevoke at work: .*No such file"):
        call(store)
    assert (dom0.calls, dom0.services) == ([], [])


def test_a_file_of_another_directory_that_hides_ours_opens_nothing_and_is_named(
    store: QubesStore, dom0: FakeQubes, over: Command
) -> None:
    assert over(store, *ADD).status == 0
    shadow = dom0.root / "run/qubes/policy.d/30-forward.policy"
    shadow.parent.mkdir()
    shadow.write_text("qubes.ForwardTCP * @anyvm @anyvm allow\n")
    with pytest.raises(StoreError, match=f"^{shadow} overrides the file that qvm-forward writes"):
        store.read_policy()
    result = over(store, "add", "work", "81", "--from", "any")
    assert result.status == 1
    assert f"{shadow} overrides the file that qvm-forward writes; remove it" in result.err
    shadow.unlink()
    assert over(store, "apply").status == 0


@pytest.mark.parametrize("status", [1, 125, 126, 127, -9])
def test_a_call_that_ends_badly_says_how(store: QubesStore, dom0: FakeQubes, status: int) -> None:
    dom0.status = status
    with pytest.raises(AnswerError, match=rf"in work ended with exit status {status}$") as caught:
        call(store)
    assert caught.value.status == status


def test_a_target_that_is_older_than_dom0_is_named(store: QubesStore, dom0: FakeQubes) -> None:
    dom0.status = ExitStatus.BAD_ARGUMENT
    with pytest.raises(AnswerError, match=r"in work ended with exit status 2, .* is older than dom0's$"):
        call(store)


def test_a_call_that_does_not_end_is_killed(store: QubesStore, dom0: FakeQubes) -> None:
    dom0.status = None
    with pytest.raises(AnswerError, match=r"in work did not end within 0\.1 s$"):
        store.ask(WORK, SERVICE, 100, 0.1, "version=1\n")
    assert dom0.process is not None
    assert dom0.process.is_killed


def test_calls_of_several_threads_are_awaited_at_once_and_share_no_app(
    store: QubesStore, dom0: FakeQubes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """qubesadmin's objects are not made for threads."""
    awaited = Barrier(4, timeout=BOUND_S)
    real_wait = FakeProcess.wait
    real_app = sys.modules["qubesadmin"].Qubes
    opened = []

    def wait(process: FakeProcess, timeout: float | None = None) -> int:
        if not process.stdout.closed:
            awaited.wait()
        return real_wait(process, timeout)

    def qubes() -> FakeApp:
        opened.append(real_app())
        return opened[-1]

    monkeypatch.setattr(sys.modules["qubesadmin"], "Qubes", qubes)
    monkeypatch.setattr(FakeProcess, "wait", wait)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: call(store), range(4))) == [ANSWER] * 4
    assert dom0.services == [(WORK, SERVICE)] * 4
    assert len(opened) >= 4


def test_no_more_calls_are_made_at_once_than_qubes_has_room_for(store: QubesStore, dom0: FakeQubes) -> None:
    dom0.status = None
    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(store.ask, WORK, SERVICE, 100, BOUND_S) for _ in range(24)]
        for _ in range(3):
            for process in [dom0.started.get(timeout=BOUND_S) for _ in range(8)]:
                process.kill()
        for one in asked:
            with pytest.raises(AnswerError, match="exit status -9"):
                one.result(BOUND_S)


def test_a_halted_qube_is_not_started_by_a_call(store: QubesStore, lab: LabDirectory) -> None:
    lab.set_state("work", QubeState.HALTED)
    with pytest.raises(NotRunningError, match=r"at work: work is not running$"):
        call(store)


def test_a_qube_that_is_gone_does_not_run(store: QubesStore) -> None:
    with pytest.raises(NotRunningError):
        store.ask(QubeName("gone"), SERVICE, 100)


@pytest.mark.parametrize(("silences", "said"), [(2, "Got empty response"), (1, "it was halted a moment ago")])
def test_a_qube_of_which_qubesd_says_nothing_may_run(
    store: QubesStore, dom0: FakeQubes, silences: int, said: str
) -> None:
    """Else calls that dom0 could not end would pass for ended."""
    left = iter(range(silences))

    def silent(called: Called) -> None:
        if called.method == "admin.vm.CurrentState" and next(left, None) is not None:
            raise empty_answer()

    dom0.fails = silent
    with pytest.raises(AnswerError, match=rf"^admin\.vm\.CurrentState at work: {said}") as caught:
        call(store)
    assert not isinstance(caught.value, NotRunningError)
    assert dom0.services == []


def test_a_management_qube_is_told_the_line_that_lets_it_end_mux_calls(
    lab: LabDirectory, policy_client: FakePolicyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = FakeQubes(lab, connection="qrexec", name="mgmt")
    install(monkeypatch, app, policy_client)
    call(QubesStore())
    app.status = 126
    with pytest.raises(StoreError, match=r"exit status 126\. If dom0's policy refuses it") as caught:
        call(QubesStore())
    found = re.search(f"'({REVOKE_SERVICE}.*?)'", str(caught.value))
    assert found is not None
    rule = PolicyRule.parse(found[1], "told")
    assert (rule.argument, rule.source.text, rule.target.text, rule.user) == (None, "mgmt", "@anyvm", "user")
    assert not rule.can_autostart
    app.says[WORK, ASK] = b""
    with pytest.raises(AnswerError, match=f"this line allows it, .*'{STATUS_SERVICE} .* mgmt ") as asked:
        QubesStore().ask(WORK, ASK, 100)
    assert asked.value.way_out == "add that line to dom0's policy"


def test_calls_of_a_management_qube_begin_beside_each_other(
    lab: LabDirectory, policy_client: FakePolicyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each asks of qubesd before is a call, too."""
    app = FakeQubes(lab, connection="qrexec", name="mgmt")
    together, run_service = Barrier(2, timeout=BOUND_S), app.run_service

    def begin(*words: str, **options: int) -> FakeProcess:
        together.wait()
        return run_service(*words, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(app, "run_service", begin)
    install(monkeypatch, app, policy_client)
    store = QubesStore(lab.root)
    names = (WORK, QubeName("sys-net"))
    assert at_once(lambda qube: store.ask(qube, SERVICE, 100), names) == dict.fromkeys(names, ANSWER)


def test_a_management_qube_is_told_that_it_cannot_call_itself(
    lab: LabDirectory, policy_client: FakePolicyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = FakeQubes(lab, connection="qrexec", name="work")
    install(monkeypatch, app, policy_client)
    app.status = 126
    with pytest.raises(AnswerError, match=r"exit status 126; no qube can call itself$") as caught:
        call(QubesStore())
    assert caught.value.way_out == "run it in dom0"
    assert QubesStore().inventory().here == WORK


def test_dom0_is_no_qube_that_calls_itself(store: QubesStore) -> None:
    assert store.inventory().here is None


ASK = f"{STATUS_SERVICE}+"


def test_an_answer_is_read_to_its_end(store: QubesStore, dom0: FakeQubes) -> None:
    dom0.says[WORK, ASK] = b"x" * 100_000
    assert store.ask(WORK, ASK, 100_000) == b"x" * 100_000
    assert dom0.process is not None
    assert not dom0.process.is_killed
    assert dom0.services == [(WORK, ASK)]


def test_a_longer_answer_is_refused_and_its_call_ended(store: QubesStore, dom0: FakeQubes) -> None:
    dom0.says[WORK, ASK] = b"x" * 101
    dom0.status = None
    with pytest.raises(AnswerError, match=r"in work said more than 100 bytes$"):
        store.ask(WORK, ASK, 100)
    assert dom0.process is not None
    assert dom0.process.is_killed


def test_a_call_that_says_all_and_does_not_end_is_killed(store: QubesStore, dom0: FakeQubes) -> None:
    dom0.says[WORK, ASK] = b"x"
    dom0.status = None
    with pytest.raises(AnswerError, match=r"in work did not end within 0\.1 s$"):
        store.ask(WORK, ASK, 100, 0.1)
    assert dom0.process is not None
    assert dom0.process.is_killed


def test_a_qube_that_cannot_be_asked_says_by_which_status(store: QubesStore, lab: LabDirectory) -> None:
    with pytest.raises(AnswerError, match=r"ended with exit status 127$") as caught:
        store.ask(WORK, ASK, 100)
    assert caught.value.status == 127
    lab.set_state("work", QubeState.HALTED)
    with pytest.raises(AnswerError, match=r"at work: work is not running$"):
        store.ask(WORK, ASK, 100)


def test_a_management_qube_cannot_read_dom0s_whole_policy(
    lab: LabDirectory, policy_client: FakePolicyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeQubes(lab, connection="qrexec", name="mgmt"), policy_client)
    (verdict,) = QubesStore().verdicts([PolicyCall("a", "+", QubeName("sys-net"), WORK)])
    assert verdict.is_allowed is None
    assert "mgmt is not dom0" in verdict.reason


def test_a_lock_that_cannot_be_made_says_who_can(store: QubesStore, dom0: FakeQubes) -> None:
    (dom0.root / "run/qubes").rmdir()
    refused = pytest.raises(StoreError, match=r"qvm-forward\.lock: No such file.*member of the group qubes")
    with refused, store.locked():
        pass


def test_where_watch_would_have_to_be_started_is_said(
    store: QubesStore, lab: LabDirectory, policy_client: FakePolicyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = "'systemctl enable --now qubes-forward-watch'"
    assert store.unwatched() == start
    with store.watching():
        assert store.unwatched() is None
    install(monkeypatch, FakeQubes(lab, connection="qrexec", name="mgmt"), policy_client)
    assert QubesStore(lab.root).unwatched() == f"{start} in mgmt, unless it runs in dom0"
