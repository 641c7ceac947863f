# SPDX-License-Identifier: GPL-2.0-or-later
"""The manual knows every command and option that there is."""

import argparse
import re
from pathlib import Path

import pytest

from qubes_fwd_qrexec.admin.views import cli, parser
from qubes_fwd_qrexec.common.errors import RuleError
from qubes_fwd_qrexec.common.rules import ForwardRule

ROOT = Path(__file__).parents[3]
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs").glob("qvm-forward*.rst")}
GENERAL = PAGES["qvm-forward"]
COMMANDS = {name: parser.subcommands(parser.build())[name] for name in parser.COMMANDS}


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


def test_the_parsers_are_what_argparse_makes() -> None:
    assert all(isinstance(command, argparse.ArgumentParser) for command in COMMANDS.values())
