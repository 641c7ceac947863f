# SPDX-License-Identifier: GPL-2.0-or-later
"""What panic's process says, in lines for people; and that nothing is taken for closed that may be open."""

import json
import shlex
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from bounds import BOUND_S
from faulty import Faulty, allowed, is_held
from worlds import ADD, Command, Result

from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore
from qubes_fwd_qrexec.window.model import panic
from qubes_fwd_qrexec.window.model.panic import REPORT_MAX_BYTES, Reading, Report

UNKNOWN = "IT IS UNKNOWN WHETHER EVERYTHING IS CLOSED"
HELD = "The rules are kept as they are, and nothing opens until you resume."
CLOSED: dict[str, Any] = {
    "version": 1,
    "is_closed": True,
    "is_held": True,
    "steps": [],
    "ended": [
        {"target": "personal", "ended": 0, "draining": 0, "problem": None},
        {"target": "work", "ended": 1, "draining": 0, "problem": None},
    ],
    "not_done": [],
    "notes": [],
    "open_still": [],
    "unconfirmed": [],
    "goes_on": [],
}
LEFT = {"target": "work", "name": "web", "exposed": "sys-net", "connections": 2, "left_s": None}
LEFT |= {"service": "qubes.ConnectTCP", "proto": "tcp"}
OPEN = CLOSED | {
    "is_closed": False,
    "ended": [],
    "steps": [
        {"step": "close-policy", "remove": ["qubes.ForwardTCP +80 sys-net work allow"], "add": []},
        {"step": "revoke", "allowances": {"work": "version=1 drains=cut\n"}},
        {"step": "remove-config", "qube": "sys-net", "feature": "vm-config.nft.work.web", "was": "version=1"},
        {"step": "end-rule", "qube": "work", "feature": "forward.old", "was": "a", "value": "b"},
    ],
    "not_done": ["sys-net: <b>cannot\x1b[1m"],
    "notes": ["this went on without the lock"],
    "open_still": ["policy: another file allows it"],
    "unconfirmed": [{"qube": "sys-net", "key": "", "lack": "no-answer", "is_opening": False, "said": "late"}],
    "goes_on": [LEFT],
}


A_REPORT = json.dumps(CLOSED).encode()
QUOTED = "qvm-forward panic: <b>\\x1b\\xff"


def read(document: object, status: int) -> Report:
    reading = Reading()
    reading.reported(json.dumps(document).encode())
    return reading.ended(status)


def test_what_is_closed_is_said_with_what_that_ended_and_what_opens_it_again() -> None:
    report = read(CLOSED, 0)
    assert (report.is_closed, report.title) == (True, "Everything is closed and held")
    assert report.lines == (("Ended 1 call in work.", False), (HELD, False))


def test_what_is_not_closed_comes_first_and_all_of_it_is_said() -> None:
    report = read(OPEN, 1)
    assert (report.is_closed, report.title) == (False, "NOT EVERYTHING IS CLOSED")
    assert [line.text for line in report.lines if line.is_bad] == [
        "Not done: sys-net: <b>cannot\\x1b[1m",
        "Still open: policy: another file allows it",
        "Still open: work web: 2 connections over qubes.ConnectTCP, which dom0 cannot end at sys-net",
        "Still open: sys-net does not answer: late",
    ]
    assert [line.text for line in report.lines[4:]] == [
        "To close it even if the qubes of its path do not answer: qvm-prefs work netvm ''",
        "To end these connections at once: qvm-shutdown work",
        "Note: this went on without the lock",
        "policy: no longer qubes.ForwardTCP +80 sys-net work allow",
        "work: end connections that are not allowed any more",
        "sys-net: let no packets through for nft.work.web",
        "work old: mark it as expired for good",
        HELD,
    ]
    assert not any(line.is_bad for line in report.lines[4:])


def test_without_a_hold_it_says_that_it_may_open_again() -> None:
    report = read(CLOSED | {"is_closed": False, "is_held": False}, 1)
    assert ("Nothing is held: what is closed may open again.", True) in report.lines
    assert HELD not in [line.text for line in report.lines]


@pytest.mark.parametrize(
    ("document", "status"),
    [
        (CLOSED, 1),
        (CLOSED, 3),
        (CLOSED, -9),
        (OPEN, 0),
        ([CLOSED], 0),
        ("closed", 0),
        (None, 0),
        *(({key: value for key, value in CLOSED.items() if key != name}, 0) for name in [*CLOSED][1:]),
        (CLOSED | {"is_closed": 1}, 0),
        (CLOSED | {"is_held": "yes"}, 0),
        (CLOSED | {"steps": [{"step": "revoke", "allowances": []}]}, 0),
        (CLOSED | {"steps": [{"step": "dance"}]}, 0),
        (CLOSED | {"ended": [{"target": "work", "ended": "1"}]}, 0),
        (CLOSED | {"ended": [{"target": "work", "new": 1}]}, 0),
        (OPEN | {"unconfirmed": [{"qube": "a", "key": "", "lack": "mood", "is_opening": False}]}, 1),
        (OPEN | {"goes_on": [LEFT | {"service": "other"}]}, 1),
    ],
)
def test_what_is_no_report_of_ours_closes_nothing(document: object, status: int) -> None:
    report = read(document, status)
    assert (report.is_closed, report.title) == (False, UNKNOWN)
    assert all(line.is_bad for line in report.lines)
    assert report.lines[-1].text == "Try again, or type in a terminal: qvm-forward panic"


@pytest.mark.parametrize("out", [b"", b"{", b"\xff", b"[" * 100_000, b" " * REPORT_MAX_BYTES + A_REPORT])
def test_what_is_no_json_or_too_long_closes_nothing(out: bytes) -> None:
    reading = Reading("/a lab")
    reading.reported(out[:1000])
    reading.reported(out[1000:])
    report = reading.ended(0)
    assert (report.is_closed, report.title) == (False, UNKNOWN)
    assert report.lines[0].text == "It ended with status 0, and its report cannot be read."
    assert report.lines[-1].text.endswith("qvm-forward --lab '/a lab' panic")


def test_how_the_process_ended_is_said() -> None:
    assert read(CLOSED, -9).lines[0].text == "It was killed by signal 9 before it could report."
    report = panic.not_started(FileNotFoundError(2, "No such file or directory"))
    assert (report.is_closed, report.title) == (False, UNKNOWN)
    assert report.lines[0].text == "It could not be started: No such file or directory."
    report = panic.not_started(OSError(19, "Gerät fehlt"), "/\x1b")
    assert report.lines[0].text == "It could not be started: Gerät fehlt."
    assert report.lines[-1].text == r"Try again, or type in a terminal: qvm-forward --lab '/\x1b' panic"


def test_lines_are_shown_as_they_come_without_the_name_of_the_program() -> None:
    reading = Reading()
    assert reading.said(b"qvm-forward: writes dom0's pol") == []
    assert reading.said(b"icy\nqvm-forward panic: <b>\x1b\xff\n\nwaits") == ["writes dom0's policy", QUOTED]
    assert reading.said(b"") == ["waits"]
    assert reading.said(b"") == []


def test_a_line_without_an_end_is_kept_and_shown_in_part() -> None:
    reading = Reading()
    for _ in range(10):
        assert reading.said(b"x" * panic.LINE_MAX_BYTES) == []
    assert reading.said(b"") == [f"{'x' * (panic.SHOWN_MAX - 3)}..."]
    long = read(OPEN | {"not_done": ["x" * 100_000], "open_still": ["y" * 100_000]}, 1)
    assert max(len(line.text) for line in long.lines) < panic.SHOWN_MAX + 100


def words_of(result: Result) -> Report:
    reading = Reading()
    reading.reported(result.out.encode())
    return reading.ended(result.status)


def test_a_report_of_each_system_is_understood(forward: Command, opened: LabDirectory) -> None:
    forward("enable", "personal", "tcp-81")
    report = words_of(forward("panic", "--json"))
    assert report.is_closed
    texts = [line.text for line in report.lines]
    assert "sys-net: stop listening for fwd.work.web" in texts
    assert texts[-1] == HELD


@pytest.mark.parametrize("refused", ["policy 0 held", "remove", "call", "inventory", "lock"])
def test_a_report_of_what_failed_is_understood(
    opened: LabDirectory, over: Callable[..., Result], refused: str
) -> None:
    report = words_of(over(Faulty(opened, refused), "panic", "--json"))
    is_closed = refused == "lock"
    assert (report.is_closed, any(line.is_bad for line in report.lines)) == (is_closed, not is_closed)
    assert report.title != UNKNOWN


@pytest.fixture
def open_lab(lab: LabDirectory, over: Command) -> LabDirectory:
    """A lab with a forward: the process works on a lab alone."""
    assert over(LabStore(lab), *ADD).status == 0
    return lab


def test_the_process_closes_everything_though_the_window_is_gone(open_lab: LabDirectory) -> None:
    command = panic.command(str(open_lab.root))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()
    assert (allowed(open_lab), is_held(open_lab), open_lab.vm_config("sys-net")) == (frozenset(), True, {})


def test_the_process_closes_everything_and_says_what_it_does(open_lab: LabDirectory) -> None:
    lab = str(open_lab.root)
    process = subprocess.run(panic.command(lab), capture_output=True, timeout=BOUND_S)
    reading = Reading(lab)
    reading.reported(process.stdout)
    assert reading.ended(process.returncode).is_closed
    assert is_held(open_lab)
    assert "writes dom0's policy" in reading.said(process.stderr)


def test_the_process_takes_no_module_from_where_the_window_was_started(
    open_lab: LabDirectory, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    process = subprocess.run(panic.command(str(open_lab.root)), capture_output=True, timeout=BOUND_S)
    assert (process.returncode, b"not ours" in process.stderr) == (0, False)


def test_the_command_to_type_is_the_one_that_was_run() -> None:
    assert panic.typed() == "qvm-forward panic"
    assert shlex.split(panic.typed("/a b"))[1:] == ["--lab", "/a b", "panic"]
    assert "--lab" not in panic.command()
