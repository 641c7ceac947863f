# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands panic and resume: everything is closed and held, whatever is wrong, until it is lifted."""

from contextlib import suppress
from threading import Event
from typing import Any

import pytest
from faulty import Faulty, Panic, allowed, is_held
from stages import Stage
from worlds import ADD, NOW, Command, content

from qubes_fwd_qrexec.admin import apply as reconciling
from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.hold import hold, resume
from qubes_fwd_qrexec.admin.snapshot import look
from qubes_fwd_qrexec.admin.states import Plan
from qubes_fwd_qrexec.common.errors import RefusedError, StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.lab.store import LabStore

HELD = "Everything is held by 'qvm-forward panic': nothing opens until 'qvm-forward resume'."

BOUND_S = 60.0

SERVING = ["sys-firewall", "sys-net", "sys-vpn", "untrusted", "vault", "work"]
"""The running qubes of the lab that offer our service."""
# On a lab that is down nothing lives.
ENDED = f"Ended 6 calls in {', '.join(SERVING)}.\n"


class Killed(BaseException):
    """SIGKILL, of which nobody is told."""


def reconcile(lab: LabDirectory, store: Any = None) -> None:
    """What `watch` does, without the lock: as dom0's does while panic is in a management qube."""
    reconciling.reconcile(store or LabStore(lab), NOW)


def test_policy_is_held_before_the_lock_then_calls_and_listeners(opened: LabDirectory, panic: Panic) -> None:
    backend = Faulty(opened)
    assert panic(backend).status == 0
    changes = [entry for entry in backend.log if entry.split()[0] in ("policy", "call", "set", "remove")]
    calls = slice(1, 1 + len(SERVING))
    changes[calls] = sorted(changes[calls])
    assert changes == [
        "policy 0 held",
        *sorted(f"call {qube}" for qube in SERVING),
        "remove sys-net vm-config.fwd.personal.tcp-81",
        "remove sys-net vm-config.fwd.work.web",
    ]
    assert backend.log.index("lock") > max(backend.log.index(f"call {qube}") for qube in SERVING)
    assert backend.given == dict.fromkeys(SERVING, "version=1 drains=cut\n")


def test_everything_is_closed_and_the_rules_are_kept(
    forward: Command, opened: LabDirectory, kind: str
) -> None:
    rules = {qube: opened.features(qube) for qube in ("work", "personal")}
    result = forward("panic")
    assert (result.status, result.err) == (0, "")
    assert result.out == (
        "Everything is closed and held: dom0 allows no forward, and no qube is told to listen.\n"
        f"{ENDED if kind == 'qubes' else ''}"
        "The rules are kept as they are. 'qvm-forward resume' opens them again; with --dry-run it only "
        "shows what that would open.\n"
    )
    assert (allowed(opened), is_held(opened), opened.vm_config("sys-net")) == (frozenset(), True, {})
    assert {qube: opened.features(qube) for qube in ("work", "personal")} == rules
    assert forward("apply").out == "Nothing to change: all is as the rules ask for.\n"
    assert forward("policy", "--json").json["is_installed"] is True


def test_what_another_policy_file_allows_is_still_open(forward: Command, opened: LabDirectory) -> None:
    mine = opened.policy_dir / "20-mine.policy"
    mine.write_text("qubes.ForwardTCP  +8080+mux  sys-net  work  allow\n")
    result = forward("panic")
    assert result.status == 1
    assert result.out.startswith("NOT EVERYTHING IS CLOSED.\n")
    assert "still open: policy: another file than 30-forward.policy allows calls of work web\n" in result.err
    mine.unlink()
    result = forward("panic")
    assert "another file" not in result.err


def test_what_another_policy_file_allows_of_one_protocol_is_still_open(
    forward: Command, opened: LabDirectory
) -> None:
    forward("set", "work", "web", "proto=both", "mode=qrexec")
    (opened.policy_dir / "20-mine.policy").write_text("qubes.ForwardUDP  +8080+mux  sys-net  work  allow\n")
    result = forward("panic")
    assert (result.status, result.out.splitlines()[0]) == (1, "NOT EVERYTHING IS CLOSED.")
    assert "still open: policy: another file than 30-forward.policy allows calls of work web\n" in result.err


def test_resume_shows_what_would_open_and_opens_it(forward: Command, opened: LabDirectory) -> None:
    before = content(opened)
    forward("panic")
    held = content(opened)
    shown = forward("resume", "--dry-run")
    assert (shown.status, content(opened)) == (0, held)
    assert shown.out.startswith("This would be open again:\n  personal tcp-81: Connections to port 81 of ")
    result = forward("resume")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("Nothing is held any more. Open again:\n  personal tcp-81: ")
    assert content(opened) == before


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("set work web srchosts=any", "web"),
        ("set work web expire=never", "web"),
        ("set work web autostart=yes", "web"),
        ("add work 82 --from any --name new", "new"),
        ("enable work late", "late"),
    ],
)
def test_a_resume_opens_nothing_that_was_not_shown(
    forward: Command, expiring: Stage, store: Backend, change: str, name: str
) -> None:
    forward("add", "work", "83", "--from", "any", "--name", "late")
    forward("disable", "work", "late")
    forward("panic")
    shown = look(store).plan(NOW, is_held=False)
    forward(*change.split())
    with pytest.raises(RefusedError, match=f"nothing was opened: work {name} would not open"):
        resume(store, NOW, shown)
    assert (allowed(expiring.lab), is_held(expiring.lab)) == (frozenset(), True)
    was_held, applied = resume(store, NOW, look(store).plan(NOW, is_held=False))
    assert (was_held, len(applied.plan.live) > 0, is_held(expiring.lab)) == (True, True, False)


def test_a_resume_may_open_less_than_was_shown(
    forward: Command, opened: LabDirectory, store: Backend
) -> None:
    forward("panic")
    shown = look(store).plan(NOW, is_held=False)
    forward("remove", "work", "web")
    resume(store, NOW, shown)
    assert not is_held(opened)
    assert "81" in "".join(allowed(opened))


def test_resume_where_nothing_is_held_says_so(forward: Command, opened: LabDirectory) -> None:
    before = content(opened)
    assert forward("resume").out == "Nothing was held.\n"
    assert content(opened) == before
    assert forward("resume", "--json").json["was_held"] is False


@pytest.mark.parametrize("listing", ["list", "plan"])
def test_listings_say_that_everything_is_held(forward: Command, opened: LabDirectory, listing: str) -> None:
    forward("panic")
    assert {entry["state"] for entry in forward(listing, "--json").json["forwards"]} == {"held"}
    assert HELD in forward(listing).out
    for qube in ("work", "personal"):
        for name in list(opened.features(qube)):
            opened.remove_feature(qube, name)
    assert HELD in forward(listing).out


def test_status_and_show_say_it_too(forward: Command, opened: LabDirectory) -> None:
    forward("panic")
    assert f"Nothing is open. {HELD}\n" in forward("status").out
    assert HELD in forward("show", "work", "web").out


def test_rules_may_be_made_and_changed_meanwhile_and_nothing_opens(
    forward: Command, opened: LabDirectory
) -> None:
    forward("panic")
    for command, says in (
        ("add work 82 --from any --name late", f"Forward work late is stored and held. {HELD}"),
        ("disable personal tcp-81", "Forward personal tcp-81 is disabled and closed."),
        ("enable personal tcp-81", f"Forward personal tcp-81 is enabled and held. {HELD}"),
        ("set work web comment=x", f"Forward work web is changed and held. {HELD}"),
    ):
        result = forward(*command.split())
        assert (result.status, result.err, result.out.startswith(says)) == (0, "", True), result
        assert (allowed(opened), is_held(opened), opened.vm_config("sys-net")) == (frozenset(), True, {})
    assert forward("add", "work", "81", "--from", "any").status == 1  # personal has that port
    forward("resume")
    assert len(allowed(opened)) == 3


@pytest.mark.parametrize("step", range(1, 16))
def test_after_its_first_write_nothing_opens_wherever_panic_is_killed(
    over: Command, opened: LabDirectory, panic: Panic, step: int
) -> None:
    """The next command closes what is left, and ends the calls."""
    entries: list[str] = []

    def kill(entry: str) -> None:
        entries.append(entry)
        # It reads the file first, and the write is its second step.
        if len(entries) == step + 2:
            raise Killed

    killed, later = Faulty(opened, before=kill), Faulty(opened)
    with suppress(Killed):
        panic(killed)
    assert over(later, "apply").status == 0
    assert (allowed(opened), is_held(opened), opened.vm_config("sys-net")) == (frozenset(), True, {})
    assert sorted(killed.given | later.given) == SERVING
    assert set((killed.given | later.given).values()) == {"version=1 drains=cut\n"}
    assert over(Faulty(opened), "apply").out == "Nothing to change: all is as the rules ask for.\n"


def test_what_has_another_lock_opens_nothing_at_any_moment(opened: LabDirectory, panic: Panic) -> None:
    """The panic of a management qube, and dom0's watch."""
    seen: list[int] = []

    def play_watch(entry: str) -> None:
        reconcile(opened)
        seen.append(len(allowed(opened)))

    assert panic(Faulty(opened, before=play_watch)).status == 0
    assert seen[:2] == [2, 2]
    assert set(seen[2:]) == {0}


@pytest.mark.parametrize("at", ["inventory", "policy 3", "set sys-net", "read"])
def test_a_command_that_began_before_a_panic_opens_nothing_after_it(
    over: Command, opened: LabDirectory, panic: Panic, at: str
) -> None:
    """Panic returns while the other one is at work, with the lock."""
    done: list[str] = []

    def interfere(entry: str) -> None:
        if entry.startswith(at) and not done:
            done.append(entry)
            assert panic(Faulty(opened, "lock")).status == 0

    before = opened.features("personal")
    over(Faulty(opened, before=interfere), "add", "work", "82", "--from", "any")
    assert done
    assert (allowed(opened), is_held(opened), opened.vm_config("sys-net")) == (frozenset(), True, {})
    assert opened.features("personal") == before


def test_a_resume_that_a_second_panic_overtakes_lifts_nothing(
    over: Command, forward: Command, opened: LabDirectory, panic: Panic
) -> None:
    """The second one begins a second later, finds the same hold, and is killed after its first write."""
    forward("panic")
    entries: list[str] = []

    def kill(entry: str) -> None:
        entries.append(entry)
        if len(entries) == 3:
            raise Killed

    def interfere(entry: str) -> None:
        if entry == "inventory" and not entries:
            with suppress(Killed):
                hold(Faulty(opened, before=kill), NOW + 1)

    result = over(Faulty(opened, before=interfere), "resume")
    assert (allowed(opened), is_held(opened), opened.vm_config("sys-net")) == (frozenset(), True, {})
    assert (result.status, result.out) == (1, "")
    assert result.err == "qvm-forward: everything was held again meanwhile, and stays closed\n"
    assert forward("apply").out == "Nothing to change: all is as the rules ask for.\n"


def test_calls_end_though_the_qubes_cannot_be_read_at_first(opened: LabDirectory, panic: Panic) -> None:
    entries: list[str] = []

    def fail(entry: str) -> None:
        entries.append(entry)
        if entries.count("inventory") == 1:
            raise StoreError("qubesd is starting")

    backend = Faulty(opened, before=lambda entry: fail(entry) if entry == "inventory" else None)
    result = panic(backend)
    assert (result.status, ENDED in result.out) == (0, True)
    assert backend.given == dict.fromkeys(SERVING, "version=1 drains=cut\n")


def test_calls_that_policy_allowed_end_though_no_qube_can_be_read(opened: LabDirectory, panic: Panic) -> None:
    backend = Faulty(opened, "inventory")
    assert panic(backend).status == 1
    assert backend.given == {"work": "version=1 drains=cut\n"}


def test_a_qubesd_that_hangs_is_not_waited_for_and_calls_end(opened: LabDirectory) -> None:
    answers = Event()

    def hang(entry: str) -> None:
        if entry == "inventory":
            assert answers.wait(BOUND_S)

    backend = Faulty(opened, before=hang)
    held = hold(backend, NOW, qubes_timeout_s=0.0)
    assert (held.is_held, held.applied, allowed(opened)) == (True, None, frozenset())
    assert [(each.target, each.ended) for each in held.ended] == [("work", 1)]
    assert held.problems == (
        "read all qubes, to find listeners and calls: no answer within 0 s; on a Qubes system "
        "'systemctl restart qubesd' may help",
    )
    answers.set()


def test_policy_is_held_though_no_qube_can_be_read(opened: LabDirectory, panic: Panic) -> None:
    result = panic(Faulty(opened, "inventory"))
    assert result.status == 1
    assert (allowed(opened), is_held(opened)) == (frozenset(), True)
    assert result.out.startswith("NOT EVERYTHING IS CLOSED.\n")
    assert "not done: read all qubes, to find listeners and calls: cannot inventory" in result.err


@pytest.mark.parametrize(
    "text", [b"\x00", b"qubes.ForwardTCP * @anyvm @anyvm allow\n", b"nonsense\n", b"\xff\xfe"]
)
def test_whatever_the_policy_file_says_it_is_replaced(
    forward: Command, opened: LabDirectory, text: bytes
) -> None:
    path = opened.policy_dir / "30-forward.policy"
    path.write_bytes(text)
    assert forward("panic").status == 0
    assert path.read_text() == policy.hold_text(NOW)


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ("policy", "not done: policy: deny every call: cannot policy 0 held"),
        ("call", "What is open to work may go on: over a mux call for at most 300 s"),
        ("remove sys-net vm-config.fwd.personal", "not done: cannot remove sys-net vm-config.fwd.personal"),
    ],
)
def test_each_step_is_tried_though_another_fails(
    opened: LabDirectory, panic: Panic, refused: str, words: str
) -> None:
    backend = Faulty(opened, refused)
    result = panic(backend)
    assert (result.status, words in result.err) == (1, True), result.err
    for entry in ("policy 0 held", "call work", "remove sys-net vm-config.fwd.work.web"):
        assert entry in backend.log
    assert panic(Faulty(opened)).status == 0


def test_without_the_lock_everything_is_closed_all_the_same(opened: LabDirectory, panic: Panic) -> None:
    result = panic(Faulty(opened, "lock"))
    assert (result.status, allowed(opened), opened.vm_config("sys-net")) == (0, frozenset(), {})
    assert "note: this went on without the lock: cannot lock" in result.err


def test_a_lock_that_is_held_is_not_waited_for_long(opened: LabDirectory, panic: Panic) -> None:
    with opened.locked():
        assert panic(Faulty(opened, lock_timeout_s=0.0)).status == 0
    assert (allowed(opened), opened.vm_config("sys-net")) == (frozenset(), {})


def test_every_running_qube_that_serves_is_told_to_cut_whatever_it_has(
    forward: Command, opened: LabDirectory, panic: Panic
) -> None:
    """Also what drains of a rule that is gone."""
    forward("remove", "work", "web")
    backend = Faulty(opened)
    assert panic(backend).status == 0
    assert backend.given == dict.fromkeys(SERVING, "version=1 drains=cut\n")
    opened.set_state("work", QubeState.HALTED)
    backend = Faulty(opened)
    assert (panic(backend).status, "work" in backend.given) == (0, False)


def test_programs_are_told_the_same(opened: LabDirectory, panic: Panic) -> None:
    data: Any = panic(Faulty(opened, "call work"), "--json").json
    assert (data["is_closed"], data["is_held"], data["open_still"], data["goes_on"]) == (False, True, [], [])
    (ended,) = [entry for entry in data["ended"] if entry["problem"]]
    assert (ended["target"], ended["problem"]) == ("work", "qubes.ForwardRevoke in work: cannot call work")
    data = panic(Faulty(opened), "--json").json
    assert (data["is_closed"], data["not_done"], data["ended"][0]["ended"]) == (True, [], 1)


def test_what_is_opened_after_the_last_write_is_seen(opened: LabDirectory, panic: Panic) -> None:
    path = opened.policy_dir / "30-forward.policy"
    text = path.read_text()

    def interfere(entry: str) -> None:
        if entry == "read":
            path.write_text(text)

    result = panic(Faulty(opened, before=interfere))
    assert result.status == 1
    assert "still open: policy: qubes.ForwardTCP +8080+mux sys-net work allow" in result.err


@pytest.mark.parametrize(
    "text", ["# Held:", "# Held:\x00 of a newer version=2", "# x\r# Held: y", " # Held:"]
)
def test_a_hold_that_says_anything_counts(forward: Command, opened: LabDirectory, text: str) -> None:
    path = opened.policy_dir / "30-forward.policy"
    path.write_text(f"{text}\n{path.read_text()}", newline="")
    forward("apply")
    assert (allowed(opened), is_held(opened)) == (frozenset(), True)
    assert forward(*ADD[:-1], "again").status == 1  # it has the port of work web


def test_a_qube_of_that_name_is_no_hold() -> None:
    assert not policy.is_held("# Held web: port 80 of sys-net to port 80\n# Held\n")
    assert not policy.is_held(f"# a comment\n# of web {policy.HOLD}\n")
    assert not policy.is_held(policy.text(Plan(())))
    assert not policy.is_held(None)


def test_what_our_own_file_still_allows_is_not_laid_to_another(opened: LabDirectory, panic: Panic) -> None:
    result = panic(Faulty(opened, "policy"))
    assert result.status == 1
    assert "still open: policy: qubes.ForwardTCP " in result.err
    assert "another file" not in result.err
