# SPDX-License-Identifier: GPL-2.0-or-later
"""The calls that end tunnels: all targets at once, and none that does not answer is called for long."""

from collections.abc import Callable
from threading import Barrier

import pytest
from memory import Memory, applied, steps
from worlds import Command, rule, world

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.apply import carry_out
from qubes_fwd_qrexec.admin.backend import Backend, HungError
from qubes_fwd_qrexec.admin.revocations import Revocation, noted
from qubes_fwd_qrexec.admin.revoking import SkippedError, revoke
from qubes_fwd_qrexec.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.values import QubeName, TargetPorts

BOUND_S = 30.0


def due(target: str, *ports: int) -> list[Revocation]:
    source = QubeName("sys-net")
    return [Revocation(policy.tunnel(QubeName(target), TargetPorts(p, p), source)) for p in ports]


class Answers(Memory):
    """Targets that answer as they are told to."""

    def __init__(self, answer: Callable[[str], None]) -> None:
        super().__init__(world())
        self._answer = answer

    def call(self, qube: QubeName, service: str) -> None:
        super().call(qube, service)
        self._answer(qube)


def hung(qube: str) -> None:
    if qube == "work":
        raise HungError("did not end within 5 s")


def test_a_target_that_does_not_answer_is_called_once_and_others_for_all() -> None:
    backend = Answers(hung)
    results = revoke([*due("work", 81, 82, 83), *due("vault", 22, 23)], backend)
    assert sorted(backend.log) == [
        "call vault qubes.ForwardRevoke+22-22+sys-net",
        "call vault qubes.ForwardRevoke+23-23+sys-net",
        "call work qubes.ForwardRevoke+81-81+sys-net",
    ]
    assert [type(result) for result in results.values()] == [
        type(None),
        type(None),
        HungError,
        SkippedError,
        SkippedError,
    ]
    assert str(results[due("work", 83)[0]]) == "work was not called for it, as it did not answer in time"


def test_a_call_that_fails_at_once_is_no_reason_not_to_make_the_next() -> None:
    def fail(qube: str) -> None:
        raise StoreError("exit status 2")

    backend = Answers(fail)
    results = revoke(due("work", 81, 82), backend)
    assert len(backend.log) == 2
    assert [str(result) for result in results.values()] == ["exit status 2"] * 2


def test_what_the_operating_system_refuses_is_a_failed_call() -> None:
    def fail(qube: str) -> None:
        raise OSError("no more processes")

    (result,) = revoke(due("work", 81), Answers(fail)).values()
    assert str(result) == "qubes.ForwardRevoke in work: no more processes"


def test_a_target_that_answers_slowly_is_not_waited_for_without_end() -> None:
    time_s = [0.0]

    def slow(qube: str) -> None:
        time_s[0] += 2.0

    backend = Answers(slow)
    results = list(revoke(due("work", *range(80, 90)), backend, elapsed=lambda: time_s[0]).values())
    assert len(backend.log) == 3
    assert results[:3] == [None] * 3
    assert {type(result) for result in results[3:]} == {SkippedError}


def test_targets_are_called_at_once() -> None:
    together = Barrier(3, timeout=BOUND_S)

    def meet(qube: str) -> None:
        together.wait()

    every = [*due("work", 80), *due("vault", 80), *due("personal", 80)]
    assert set(revoke(every, Answers(meet)).values()) == {None}


def test_nothing_to_be_ended_needs_no_call() -> None:
    assert revoke([], Answers(hung)) == {}


def test_what_was_not_called_for_is_undone_and_noted_and_said_once() -> None:
    backend = Answers(hung)
    more = rule("srcports=81", name="more")
    applied(backend, rule(), more)
    outcome = carry_out(steps(backend), backend, backend.read_policy())
    assert len(outcome.problems) == 1
    assert [step.words() for step in outcome.undone] == [
        ["work: end the tunnels of sys-net to port 80"],
        ["work: end the tunnels of sys-net to port 81"],
    ]
    assert noted(backend.policy) == set(due("work", 80, 81))
    assert not any(key.startswith("vm-config") for key in backend.qubes[QubeName("sys-net")])


class Owing:
    """Tunnels of work that cannot be ended, for as long as ``is_hung``."""

    def __init__(self, store: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.is_hung = True
        monkeypatch.setattr(type(store), "call", lambda _, qube, service: self._call(qube, service))

    def _call(self, qube: str, service: str) -> None:
        self.calls.append(service)
        if self.is_hung:
            raise HungError(f"{service} in {qube} did not end within 5 s")


@pytest.fixture
def owing(forward: Command, store: Backend, monkeypatch: pytest.MonkeyPatch) -> Owing:
    """A system that owes the end of three tunnels to one target."""
    for port in ("80", "81", "82"):
        forward("add", "work", port, "--from", "any")
    found = Owing(store, monkeypatch)
    result = forward("remove", "work", "tcp-80", "tcp-81", "tcp-82")
    assert result.status == 1
    assert "the rules are changed, but not everything could be done: qubes.ForwardRevoke+80-80" in result.err
    assert found.calls == ["qubes.ForwardRevoke+80-80+sys-net"]
    found.calls.clear()
    return found


OTHERS = [
    (("add", "vault", "90", "--via", "sys-net", "--from", "any"), "Forward vault tcp-90 is stored and "),
    (("set", "personal", "mine", "comment=x"), "Forward personal mine is changed and "),
    (("disable", "personal", "mine"), "Forward personal mine is disabled"),
    (("remove", "personal", "mine"), "Forward personal mine is removed and closed.\n"),
    (("tunnel", "mark", "vault"), "vault is "),
    (("import", "-"), "Imported 0 forwards.\n"),
]


@pytest.mark.parametrize(("argv", "said"), OTHERS)
def test_what_is_owed_from_before_is_a_warning_and_no_fault_of_another_command(
    forward: Command, owing: Owing, lab: LabDirectory, argv: tuple[str, ...], said: str
) -> None:
    owing.is_hung = False
    forward("add", "personal", "70", "--from", "any", "--name", "mine", "--no-apply")
    owing.is_hung = True
    result = forward(*argv)
    assert result.status == 0
    assert result.out.startswith(said)
    assert result.err == (
        "qvm-forward: note: tunnels of earlier changes are still not ended: "
        "qubes.ForwardRevoke+80-80+sys-net in work did not end within 5 s. dom0's policy is closed, but "
        "tunnels that sys-net has to work may take connections for 300 s more, and those that are open go "
        "on, until 'qvm-forward apply' can end them or work is shut down\n"
    )
    assert len(noted((lab.policy_dir / "30-forward.policy").read_text())) == 3


def test_apply_itself_fails_until_nothing_is_owed(forward: Command, owing: Owing, lab: LabDirectory) -> None:
    result = forward("apply")
    assert result.status == 1
    assert "not everything could be done: qubes.ForwardRevoke+80-80+sys-net in work did not" in result.err
    owing.is_hung = False
    assert forward("apply").status == 0
    assert owing.calls[-3:] == [f"qubes.ForwardRevoke+{port}-{port}+sys-net" for port in (80, 81, 82)]
    assert noted((lab.policy_dir / "30-forward.policy").read_text()) == set()


def test_a_change_of_its_own_that_fails_is_an_error_beside_what_is_owed(
    forward: Command, owing: Owing
) -> None:
    owing.is_hung = False
    forward("add", "personal", "70", "--from", "any", "--name", "mine", "--via", "sys-net")
    forward("add", "work", "70:71", "--from", "any", "--name", "mine")
    owing.is_hung = True
    result = forward("remove", "work", "mine")
    assert result.status == 1
