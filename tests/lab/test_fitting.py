# SPDX-License-Identifier: GPL-2.0-or-later
"""What is offered on the line of qvm-forward-lab is what the command could take there."""

from pathlib import Path

import pytest

from qubes_fwd_qrexec.lab import cli
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.directory import LabDirectory

RUNNING = ["personal", "sys-firewall", "sys-net", "sys-vpn", "untrusted", "vault"]
TEMPLATES = ["debian-12", "fedora-42"]
LINES = [
    ("sh", ["shutdown"]),
    ("--l", ["--lab"]),
    ("--lab ", [":directory"]),
    ("init ", [":directory"]),
    ("verdicts ", [":file"]),
    ("up --no", ["--no-netns"]),
    ("down ", []),
    ("start ", [*TEMPLATES, "work"]),
    ("start work w", []),
    ("shutdown ", RUNNING),
    ("shutdown vault v", []),
    ("remove ", [*TEMPLATES, "work"]),
    ("listen sys-", ["sys-firewall", "sys-net", "sys-vpn"]),
    ("run ", sorted(["lan", *RUNNING, "provider"])),
    ("run vault ", [":file"]),
    ("prefs ", sorted([*TEMPLATES, *RUNNING, "work"])),
    ("prefs debian-12 ", ["ip", "ip6", "label", "netvm", "provides_network"]),
    ("prefs work t", ["template", "template_for_dispvms"]),
    ("prefs work label g", ["gray", "green"]),
    ("prefs work netvm ", ["sys-firewall", "sys-net", "sys-vpn"]),
    ("prefs work template ", TEMPLATES),
    ("prefs work template-for-dispvms ", ["False", "True"]),
    ("prefs work ip ", []),
    ("features work ", ["service.mine"]),
    ("features work service.mine ", []),
    ("service work ", ["mine", "qubes-forward-listener", "qubes-forward-nft"]),
    ("service work mine ", ["off", "on"]),
    ("tags work ", ["add", "del", "list"]),
    ("tags work add ", []),
    ("tags work del ", ["one", "two"]),
    ("tags work del one ", ["two"]),
    ("create --class D", ["DispVM"]),
    ("create --template=f", ["--template=fedora-42"]),
    ("create --class DispVM --template ", ["vault"]),
    ("create --class=AppVM --template ", TEMPLATES),
    ("create ", []),
    ("clone wor", ["work"]),
    ("clone work ", []),
    ("knob l", ["latency_ms"]),
    ("knob d", ["drop"]),
    ("knob latency_ms ", []),
    ("relay --transport m", ["mux"]),
    ("relay ", []),
]


@pytest.fixture
def lab(tmp_path: Path) -> LabDirectory:
    """``work`` is halted, and has a service and two tags; disposables can be made from ``vault``."""
    made = create_lab(tmp_path / "lab")
    made.set_feature("work", "service.mine", "")
    for words in ("shutdown work", "tags work add one two", "prefs vault template_for_dispvms True"):
        assert cli.main(["--lab", str(made.root), *words.split(" ")]) == 0
    return made


def offered(capsys: pytest.CaptureFixture[str], line: str) -> list[str]:
    capsys.readouterr()
    assert cli.main(["__complete", *line.split(" ")]) == 0
    return capsys.readouterr().out.split()


def test_what_fits_is_offered_and_nothing_else(
    lab: LabDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QVM_FORWARD_LAB", str(lab.root))
    assert {line: offered(capsys, line) for line, _ in LINES} == dict(LINES)


def test_the_lab_is_the_one_that_the_line_names_and_without_one_nothing_of_it_is_offered(
    lab: LabDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QVM_FORWARD_LAB", "/nowhere")
    assert offered(capsys, f"--lab {lab.root} start w") == ["work"]
    assert offered(capsys, "start ") == offered(capsys, "prefs work ") == []
    monkeypatch.delenv("QVM_FORWARD_LAB")
    assert offered(capsys, "start ") == []
    assert offered(capsys, "knob v") == ["vchans_per_caller"]
