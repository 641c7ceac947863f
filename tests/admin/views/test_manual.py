# SPDX-License-Identifier: GPL-2.0-or-later
"""The manual and the completion know every command and option that there is."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import Command

from qubes_fwd_qrexec.admin.views import cli, complete, parser
from qubes_fwd_qrexec.common.errors import RuleError
from qubes_fwd_qrexec.common.rules import ForwardRule
from qubes_fwd_qrexec.lab.directory import LabDirectory

ROOT = Path(__file__).parents[3]
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs").glob("qvm-forward*.rst")}
GENERAL = PAGES["qvm-forward"]
COMMANDS = parser.commands_of(parser.build())


def test_every_command_is_one_that_runs() -> None:
    assert all(callable(cli.command(name)) for name in COMMANDS)


@pytest.mark.parametrize("option", ["mode", "proto", "transport", "proxy", "on-expire"])
def test_the_words_that_help_offers_are_those_that_a_rule_takes(option: str) -> None:
    arguments = parser.COMMANDS["add"].arguments
    (settings,) = (settings for flags, settings in arguments if f"--{option}" in flags)
    with pytest.raises(RuleError) as wrong:
        ForwardRule.parse(f"{option}=neither")
    assert str(wrong.value).partition(" one of ")[2].split(", ") == settings["metavar"].split("|")


def page_of(name: str) -> str:
    """The one page that has a command in its NAME, by which man(1) finds it."""
    (page,) = (text for text in PAGES.values() if f"qvm-forward-{name}" in names(text))
    return page


def names(page: str) -> list[str]:
    line = page.split("\nNAME\n====\n\n")[1].partition("\n")[0]
    return line.partition(" - ")[0].split(", ")


def options(page: str) -> set[str]:
    return set(re.findall(r"^(?:-\w, )?(--[a-z-]+)", page, re.MULTILINE))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_its_options_are_in_the_manual(name: str) -> None:
    page = page_of(name)
    assert f"**{name}**" in page
    assert f"**{name}**" in GENERAL
    given = {option for option in COMMANDS[name]._option_string_actions if option.startswith("--")}
    known = options(page) | options(GENERAL)
    assert given <= (known | options(page_of("add")) if name == "set" else known)


def test_the_manual_has_no_command_and_no_option_that_there_is_not() -> None:
    for stem, page in PAGES.items():
        if stem in ("qvm-forward", "qvm-forward-json", "qvm-forward-lab"):
            continue
        assert names(page)[0] == stem
        commands = [COMMANDS[name.removeprefix("qvm-forward-")] for name in names(page)]
        assert options(page) <= {option for command in commands for option in command._option_string_actions}
    assert options(GENERAL) == {"--help", "--version", "--lab", "--json", "--quiet", "--verbose"}


def test_every_command_and_option_has_help() -> None:
    for command in COMMANDS.values():
        assert command.description
        assert isinstance(command.format_help(), str)
        for action in command._actions:
            assert action.help or (action.metavar and not action.option_strings), action


@pytest.fixture
def system(forward: Command, lab: LabDirectory) -> LabDirectory:
    forward("add", "work", "80", "--from", "any", "--name", "web")
    forward("add", "personal", "81", "--from", "any")
    lab.set_feature("vault", "forward.bad", "x")
    lab.set_feature("sys-firewall", "forward.tunnel", "1")
    return lab


QUBES = ["personal", "sys-firewall", "sys-net", "sys-vpn", "untrusted", "vault", "work"]
LINES = [
    ([""], sorted(COMMANDS)),
    (["re"], ["remove", "resume"]),
    (["--l"], ["--lab"]),
    (["--lab", ""], []),
    (["add", ""], QUBES),
    (["add", "work", ""], []),
    (["add", "work", "80", "--m"], ["--mode"]),
    (["add", "work", "80", "--mode", ""], ["auto", "nft", "qrexec"]),
    (["add", "work", "80", "--from", "a"], ["any"]),
    (["add", "work", "80", "--from", "w"], ["work"]),
    (["set", "work", "web", "srchosts=p"], ["srchosts=personal"]),
    (["add", "work", "80", "--comment", ""], []),
    (["add", "work", "80", "--via", "sys-n"], ["sys-net"]),
    (["add", "--autostart", "wor"], ["work"]),
    (["list", "work", "va"], ["vault"]),
    (["status", "va"], ["vault"]),
    (["panic", ""], []),
    (["resume", ""], []),
    (["resume", "--d"], ["--dry-run"]),
    (["tunnel", ""], ["list", "mark", "unmark"]),
    (["tunnel", "mark", ""], ["sys-net", "sys-vpn"]),
    (["tunnel", "unmark", ""], ["sys-firewall"]),
    (["tunnel", "list", ""], []),
    (["tunnel", "mark", "sys-net", ""], []),
    (["show", ""], ["personal", "vault", "work"]),
    (["show", "work", ""], ["web"]),
    (["show", "work", "web", ""], []),
    (["diagnose", ""], ["personal", "vault", "work"]),
    (["diagnose", "work", ""], ["web"]),
    (["diagnose", "work", "web", ""], []),
    (["remove", "vault", ""], ["bad"]),
    (["remove", "work", "web", ""], ["web"]),
    (["set", "work", "web", "exp"], ["expire="]),
    (["set", "work", "web", "mode="], ["mode=auto", "mode=nft", "mode=qrexec"]),
    (["set", "work", "web", "on-expire=d"], ["on-expire=drain"]),
    (["set", "work", "web", "follow-netvm="], ["follow-netvm=no", "follow-netvm=yes"]),
    (["set", "work", "web", "via=sys-n"], ["via=sys-net"]),
    (["set", "work", "web", "comment="], []),
    (["add", "work", "80", "--mode=q"], ["--mode=qrexec"]),
    (["add", "work", "80", "--via=sys-n"], ["--via=sys-net"]),
    (["add", "work", "80", "--nonsense="], []),
    (["export", "--format=j"], ["--format=json"]),
    (["export", "--format", ""], ["json", "line", "xml", "yaml"]),
    (["import", ""], []),
    (["nonsense", ""], sorted(COMMANDS)),
    ([], sorted(COMMANDS)),
]


def test_candidates(system: LabDirectory) -> None:
    whole, environ = parser.build(), {"QVM_FORWARD_LAB": str(system.root)}
    for words, offered in LINES:
        found = complete.candidates(whole, words, environ)
        assert [word for word in found if word != "-h"] == offered, words


def test_candidates_are_those_of_the_lab_on_the_line(system: LabDirectory) -> None:
    for lab in (["--lab", str(system.root)], [f"--lab={system.root}"]):
        assert complete.candidates(parser.build(), [*lab, "show", "w"], {}) == ["work"]
    assert complete.candidates(parser.build(), ["--lab", "/nowhere", "show", ""], {}) == []
    assert complete.candidates(parser.build(), ["--lab", "/nowhere", "show", "work", ""], {}) == []
    assert complete.candidates(parser.build(), ["--lab", "/nowhere", "tunnel", "mark", ""], {}) == []


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("qvm-forward rem", ["remove"]),
        ("qvm-forward set work web mode=q", ["qrexec"]),
        ("qvm-forward show ", ["personal", "vault", "work"]),
        ("qvm-forward remove work ", ["web"]),
        ("qvm-forward add work 80 --mode ", ["auto", "nft", "qrexec"]),
        ("qvm-forward set work web on-", ["on-expire="]),
        ("qvm-forward set work web expire=", ["1d", "8h", "never"]),
    ],
)
def test_bash_offers_the_same(system: LabDirectory, tmp_path: Path, line: str, offered: list[str]) -> None:
    program = tmp_path / "qvm-forward"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m qubes_fwd_qrexec.admin.views.cli "$@"\n')
    program.chmod(0o755)
    script = (
        f". {ROOT}/completions/qvm-forward.bash\n"
        "COMP_LINE=$1 COMP_POINT=${#1}\n"
        '_qvm_forward; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", line],
        env=environ | {"QVM_FORWARD_LAB": str(system.root)},
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == offered


def test_the_parsers_are_what_argparse_makes() -> None:
    assert all(isinstance(command, argparse.ArgumentParser) for command in COMMANDS.values())
