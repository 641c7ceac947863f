# SPDX-License-Identifier: GPL-2.0-or-later
"""Qubes' own tools as subcommands: what they print and how they fail, and that a lab that is up has followed
when they return.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest

from qubes_fwd_qrexec.lab import asking, daemon, units
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.cli import main
from qubes_fwd_qrexec.lab.directory import LabDirectory, write_text
from qubes_fwd_qrexec.lab.inhabitants import inhabitants
from qubes_fwd_qrexec.lab.running import client_command
from qubes_fwd_qrexec.lab.units import Unit

from .lab_up import BOUND_S, call

Said = pytest.CaptureFixture[str]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LabDirectory]:
    made = create_lab(tmp_path / "lab")
    monkeypatch.setenv("QVM_FORWARD_LAB", str(made.root))
    yield made
    daemon.stop(made)


def test_prefs_prints_as_qvm_prefs_does(lab: LabDirectory, capsys: Said) -> None:
    assert main(["prefs", "vault"]) == 0
    assert capsys.readouterr().out == (
        "icon                  -  appvm-black\n"
        "ip                    -  10.137.0.12\n"
        "ip6                   -  fd09:24ef:4179::a89:c\n"
        "klass                 -  AppVM\n"
        "label                 -  black\n"
        "name                  -  vault\n"
        "netvm                 D  None\n"
        "provides_network      D  False\n"
        "template              -  fedora-42\n"
        "template_for_dispvms  D  False\n"
    )
    assert main(["prefs", "vault", "netvm", "sys-vpn"]) == 0
    assert main(["prefs", "vault", "netvm"]) == 0
    assert main(["prefs", "vault", "template-for-dispvms"]) == 0
    assert main(["prefs", "vault", "netvm", ""]) == 0
    assert main(["prefs", "vault", "netvm"]) == 0
    assert capsys.readouterr().out == "sys-vpn\nFalse\n"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("prefs none-such", 2, "no such domain: 'none-such'"),
        ("prefs work memory", 2, "no such property: 'memory'"),
        ("prefs work memory 400", 2, "no such property: 'memory'"),
        ("prefs work netvm vault", 1, "The vault qube does not provide network"),
        ("features work --unset", 2, "--unset requires a feature"),
        ("service work ntpd perhaps", 1, "Invalid literal for boolean property: 'perhaps'"),
        ("service none-such", 2, "no such domain: 'none-such'"),
        ("tags work add", 2, "a tag must follow"),
        ("create --property netvm new", 2, "Invalid property token: 'netvm'"),
        ("clone work personal", 1, "Qube already exists: personal"),
        ("clone work 4711", 2, "'4711' is not a qube's name"),
        ("start work", 1, "Error: Starting qube failed: work: Domain is already running"),
        ("start work none-such", 2, "no such domain: 'none-such'"),
        ("shutdown sys-net", 1, "Error: Failed to shut down: sys-net: There are other VMs connected"),
        ("remove --force dom0", 1, "Domain 'dom0' cannot be removed."),
        ("remove --force work", 1, "Domain is not powered off: 'work'"),
        ("remove --force fedora-42", 1, "It is in use as:\n - template for sys-firewall\n"),
    ],
)
def test_refusal_is_said_as_by_the_tool_of_qubes(
    lab: LabDirectory, words: str, status: int, said: str, capsys: Said
) -> None:
    before = lab.qubes()
    assert main(words.split()) == status
    assert said in capsys.readouterr().err
    assert lab.qubes() == before


def test_services_and_features_are_switched_and_told(lab: LabDirectory, capsys: Said) -> None:
    for words in ("x on", "yy off", "z on", "z --unset"):
        assert main(["service", "work", *words.split()]) == 0
    assert lab.features("work") == {"service.x": "1", "service.yy": ""}
    assert capsys.readouterr().out == ""
    assert main(["service", "work"]) == 0
    assert main(["service", "work", "yy"]) == 0
    assert main(["service", "work", "z"]) == 1
    assert main(["features", "work", "os", "Linux"]) == 0
    assert main(["features", "work", "os"]) == 0
    assert main(["features", "work"]) == 0
    assert (
        capsys.readouterr().out
        == "x   on\nyy  off\noff\nLinux\nos          Linux\nservice.x   1\nservice.yy\n"
    )


def test_a_qube_is_made_with_its_label(lab: LabDirectory, capsys: Said) -> None:
    assert main(["create", "--label", "purple", "new"]) == main(["create", "other"]) == 0
    assert (lab.qube("new").label, lab.qube("other").label) == ("purple", "red")
    assert main(["prefs", "new", "icon"]) == 0
    assert capsys.readouterr().out == "appvm-purple\n"


def test_tags_are_added_told_and_taken_away(lab: LabDirectory, capsys: Said) -> None:
    assert main(["tags", "work", "add", "b", "a"]) == 0
    assert main(["tags", "work", "del", "c"]) == 0
    assert main(["tags", "work"]) == 0
    assert main(["tags", "work", "list", "b"]) == 0
    assert main(["tags", "work", "list", "c"]) == 1
    assert capsys.readouterr().out == "a\nb\nb\n"


def test_qube_is_removed_only_by_one_who_says_so(
    lab: LabDirectory, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["shutdown", "vault"])
    for answer in ("", "n\n"):
        monkeypatch.setattr("sys.stdin", StringIO(answer))
        assert main(["remove", "vault"]) == 1
        assert "Remove cancelled." in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", StringIO("y\n"))
    assert main(["remove", "vault"]) == 0
    assert "vault" not in lab.qube_names()


def test_shutdown_returns_when_the_calls_and_everything_else_of_the_qube_have_ended(
    lab: LabDirectory, capsys: Said
) -> None:
    write_text(lab.policy_dir / "30-forward.policy", "* * @anyvm @anyvm allow\n")
    service = lab.qube_dir("work").service_dirs[0] / "test.Service"
    service.write_text("#!/bin/sh\necho up; exec cat\n", encoding="utf-8")
    service.chmod(0o755)
    daemon.start(lab, daemon.Network.LOOPBACK)
    assert main(["service", "work", "qubes-forward-listener", "on"]) == 0
    assert main(["shutdown", "work"]) == main(["start", "work"]) == 0
    # What its switches ask for runs when it has started.
    assert units.running(lab, "work") == {Unit.LISTENER}
    assert main(["status"]) == 0
    assert "work                 Running: the listener\n" in capsys.readouterr().out
    program = [sys.executable, "-c", "print('up', flush=True); input()"]
    caller, server = (
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for words in (
            [*client_command(lab, "sys-net"), "work", "test.Service"],
            units.in_qube(lab, "work", *program),
        )
    )
    with caller, server:
        for process in (caller, server):
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
        assert main(["shutdown", "work"]) == 0
        assert inhabitants(lab.qube_dir("work").root) == []
        assert asking.ask(lab, {"do": "status"})["calls"] == {}
        assert caller.wait(BOUND_S) == 255
        assert server.wait(BOUND_S) != 0
    assert units.running(lab, "work") == set()
    assert main(["run", "work", "--", "true"]) == 1


def test_lab_that_is_up_knows_a_new_qube_and_forgets_one_that_is_removed(
    lab: LabDirectory, capsys: Said
) -> None:
    write_text(lab.policy_dir / "30-forward.policy", "* * @anyvm @anyvm allow\n")
    daemon.start(lab, daemon.Network.LOOPBACK)
    assert main(["clone", "work", "work2"]) == 0
    assert main(["start", "work2"]) == 0
    # It is called, and it calls.
    assert call(lab, "qubes.Missing", "work2").returncode == 127
    client = [*client_command(lab, "work2"), "work", "qubes.Missing"]
    done = subprocess.run(client, stdin=subprocess.DEVNULL, capture_output=True, timeout=BOUND_S, check=False)
    assert done.returncode == 127
    assert main(["shutdown", "work2"]) == main(["remove", "-f", "work2"]) == 0
    assert call(lab, "qubes.Missing", "work2").returncode == 126
    assert not os.path.lexists(lab.qubes_dir / "work2")
    assert capsys.readouterr().err == ""
