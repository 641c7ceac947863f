# SPDX-License-Identifier: GPL-2.0-or-later
"""What a parser itself knows of what may come next."""

import argparse
from collections.abc import Iterable

import pytest

from qubes_fwd_qrexec.admin.views.complete import Blank, Line, candidates


class Fitting:
    """Fills in what it was asked for; ``--never`` is of no use."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def found(self, blank: Blank) -> Iterable[str]:
        return blank.words or [f"{blank.kind}/{blank.option}/{len(self._line.given)}"]

    def is_offered(self, option: argparse.Action) -> bool:
        return option.dest != "never"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument("--lab", metavar="DIR")
    commands = made.add_subparsers(dest="command")
    send = commands.add_parser("send", aliases=["snd"], add_help=False)
    send.set_defaults(command="send")
    send.add_argument("-s", "--speed", choices=("fast", "slow"))
    send.add_argument("--to", metavar="WHOM", dest="whom")
    send.add_argument("--dry", action="store_true")
    send.add_argument("--never", action="store_true")
    send.add_argument("how", metavar="up|down")
    send.add_argument("what", metavar="THING", nargs="*")
    run = commands.add_parser("run", add_help=False)
    run.add_argument("file", metavar="FILE")
    run.add_argument("rest", nargs=argparse.REMAINDER, metavar="-- PROGRAM ARGS")
    return made


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("", ["run", "send"]),
        ("sn", []),  # a short form is understood, and not offered beside the full one
        ("-", ["--lab"]),
        ("--lab ", [":directory"]),
        ("--lab=x", [":directory"]),
        ("--lab x s", ["send"]),
        ("send ", ["down", "up"]),
        ("snd u", ["up"]),
        ("send up ", ["THING//1"]),
        ("send up a b ", ["THING//3"]),
        ("send up x", []),  # what is filled in does not begin so
        ("send --", ["--dry", "--speed", "--to"]),
        ("send --dry --s", ["--speed"]),
        ("send --dry -s fast --", ["--to"]),  # nothing is said twice
        ("send --speed=fast --d", ["--dry"]),
        ("send --speed ", ["fast", "slow"]),
        ("send -s s", ["slow"]),
        ("send --speed=f", ["--speed=fast"]),
        ("send --to ", ["WHOM/whom/0"]),
        ("send --to=", ["--to=WHOM/whom/0"]),
        ("send --to=x up ", ["THING//1"]),
        ("send --what ", ["down", "up"]),
        ("send --what=", []),
        ("run ", [":file"]),
        ("run f", [":file"]),
        ("run f -- ", [":file"]),
    ],
)
def test_what_may_come_next(line: str, offered: list[str]) -> None:
    assert candidates(parser(), line.split(" "), Fitting) == offered


def test_without_a_word_there_are_the_commands() -> None:
    assert candidates(parser(), [], Fitting) == ["run", "send"]
