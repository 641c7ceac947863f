# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker in the background, by the program that users have: up, down, status, knob, run, verdicts."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio
from helpers import until

from qubes_fwd_qrexec.lab import asking, daemon
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.cli import main
from qubes_fwd_qrexec.lab.directory import LabDirectory, write_text
from qubes_fwd_qrexec.lab.running import client_command

from .lab_up import BOUND_S, call, kill_broker

VECTORS = Path(__file__).parents[1] / "vectors" / "policy-verdicts.json"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LabDirectory]:
    made = create_lab(tmp_path / "lab")
    monkeypatch.setenv("QVM_FORWARD_LAB", str(made.root))
    write_text(made.policy_dir / "30-forward.policy", "* * @anyvm @anyvm allow\n")
    service = made.qube_dir("work").service_dirs[0] / "test.Service"
    service.write_text("#!/bin/sh\necho up; cat; exit 3\n", encoding="utf-8")
    service.chmod(0o755)
    try:
        yield made
    finally:
        daemon.stop(made)


@contextmanager
def calling(lab: LabDirectory) -> Iterator[subprocess.Popen[bytes]]:
    """A call that is up and goes on."""
    client = subprocess.Popen(
        [*client_command(lab, "sys-net"), "work", "test.Service"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        yield client


def test_up_takes_calls_and_down_ends_all(lab: LabDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--no-netns"]) == 0
    out = capsys.readouterr().out
    assert "share this machine's loopback (the loopback form)" in out
    assert "\nrunning: personal, sys-firewall, sys-net, sys-vpn, untrusted, vault, work\n" in out
    assert call(lab).returncode == 3
    assert main(["up"]) == 1
    assert "is already up" in capsys.readouterr().err
    # A call has its place until its agent has ended, a moment after its client has.
    trio.run(until, lambda: asking.ask(lab, {"do": "status"})["calls"] == {})
    assert main(["status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["up"], status["network"], status["calls"]) == (True, "loopback", {})
    assert main(["down"]) == 0
    assert main(["down"]) == 0
    assert "was not up" in capsys.readouterr().out
    assert not lab.qube_dir("sys-net").agent_socket.exists()
    assert main(["status"]) == 0
    assert "down" in capsys.readouterr().out
    assert call(lab).returncode == 1


def test_up_recovers_after_the_broker_was_killed(lab: LabDirectory) -> None:
    pid = daemon.start(lab, daemon.Network.LOOPBACK)
    with calling(lab) as client:
        kill_broker(lab, pid)
        assert client.wait(BOUND_S) == 255
    assert lab.qube_dir("sys-net").agent_socket.exists()
    assert daemon.start(lab, daemon.Network.LOOPBACK) != pid
    assert call(lab).returncode == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be another user")
def test_lab_that_root_has_brought_up_says_so_to_its_owner(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as home, ExitStack() as undo:
        Path(home).chmod(0o755)
        lab = create_lab(Path(home, "lab"))
        for path in (lab.root, *lab.root.rglob("*")):
            os.chown(path, 65534, 65534, follow_symlinks=False)
        undo.callback(daemon.stop, lab)
        # What Python loads when it needs it first may be where the other user cannot read.
        assert daemon.start(lab, daemon.Network.LOOPBACK) == daemon.broker_pid(lab)
        undo.callback(os.seteuid, 0)
        os.seteuid(65534)
        for words in ("status", "run work -- true", "shutdown work"):
            assert main(["--lab", str(lab.root), *words.split()]) == 1
            said = capsys.readouterr().err
            assert said.endswith(": another user has brought it up, and only they can use it now\n")


def test_pid_of_another_program_is_not_taken_for_a_broker(lab: LabDirectory) -> None:
    lab.pid_file.write_text(f"{os.getpid()}\n", encoding="ascii")
    assert daemon.broker_pid(lab) is None
    assert daemon.stop(lab) is False


def test_signal_of_a_service_to_its_agent_does_not_end_the_broker(lab: LabDirectory) -> None:
    daemon.start(lab, daemon.Network.LOOPBACK)
    service = lab.qube_dir("work").service_dirs[0] / "test.Service"
    service.write_text("#!/bin/sh\nkill -USR1 $QREXEC_AGENT_PID; exit 8\n", encoding="utf-8")
    assert call(lab).returncode == 8
    assert call(lab).returncode == 8


def test_broker_that_cannot_start_says_why(lab: LabDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    lab.qube_dir("work").file.write_text("{", encoding="utf-8")
    assert main(["up", "--no-netns"]) == 1
    assert "work/qube.json" in capsys.readouterr().err
    assert daemon.broker_pid(lab) is None


def test_knobs_are_set_by_name_and_calls_dropped(
    lab: LabDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.start(lab, daemon.Network.LOOPBACK)
    assert main(["knob", "refuse", "work"]) == 0
    assert call(lab).returncode == 126
    assert main(["knob", "refuse", ""]) == 0
    assert lab.knobs().refuse == ()
    with calling(lab) as client:
        assert main(["knob", "drop", "1"]) == 0
        assert client.wait(BOUND_S) == 255
    assert "calls dropped: 1" in capsys.readouterr().out
    assert main(["knob"]) == 0
    assert json.loads(capsys.readouterr().out)["latency_ms"] == 0
    assert main(["knob", "latency_ms"]) == 0
    assert capsys.readouterr().out == "latency_ms = 0\n"


@pytest.mark.parametrize(
    "words",
    [
        ["knob", "nosuch", "1"],
        ["knob", "nosuch"],
        ["knob", "drop"],
        ["--lab", "", "status"],
        ["init", ""],
        ["knob", "drop", "2"],
        ["knob", "drop", "x"],
        ["run", "work"],
    ],
)
def test_bad_words_are_usage_errors(
    lab: LabDirectory, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("qvm-forward-lab: ")


def test_without_a_lab_the_program_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("QVM_FORWARD_LAB", raising=False)
    assert main(["status"]) == 2
    assert "--lab DIR" in capsys.readouterr().err
    assert main(["--lab", str(tmp_path), "status"]) == 1
    assert main(["init", str(tmp_path / "new")]) == 0
    assert main(["--lab", str(tmp_path / "new"), "status"]) == 0
    assert main(["--lab", str(tmp_path / "new"), "knob", "drop", "1"]) == 1


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["up", "--no-netns"], "run/broker.log: Is a directory"),
        (["run", "work", "--", "true"], ": down; 'qvm-forward-lab up' starts it"),
        (["knob", "drop", "1"], ": down; 'qvm-forward-lab up' starts it"),
    ],
)
def test_what_cannot_be_done_is_said_with_its_place(
    lab: LabDirectory, words: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.log_file.mkdir(parents=True)
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"qvm-forward-lab: {lab.root}")
    assert said.endswith(f"{what}\n")
    assert "Errno" not in said


def test_a_reader_that_has_seen_enough_is_no_error(lab: LabDirectory) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "qubes_fwd_qrexec.lab.cli", "--lab", str(lab.root), "status"],
            stdout=out,
            stderr=subprocess.PIPE,
            timeout=BOUND_S,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"")


def test_verdicts_are_counted_and_differences_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verdicts", str(VECTORS)]) == 0
    assert capsys.readouterr().out == "1205 verdicts agree, 0 differ\n"
    data = json.loads(VECTORS.read_text(encoding="utf-8"))
    data["cases"] = data["cases"][:3]
    data["cases"][1]["result"] = {"outcome": "allow"}
    path = tmp_path / "v.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert main(["verdicts", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("2 verdicts agree, 1 differ\ncase 1:")
    assert main(["verdicts", "--json", str(path)]) == 1
    assert json.loads(capsys.readouterr().out)["differ"] == 1
