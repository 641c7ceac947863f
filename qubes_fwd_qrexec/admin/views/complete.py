# SPDX-License-Identifier: GPL-2.0-or-later
"""What the shell may offer next, for the files in completions/: words in, candidates out.

The line is half typed: nothing here complains, and where nothing fits nothing is offered. What stands in
capitals in the help is to be filled in, and who knows the system says with what. The parser knows the rest.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from .parser import subcommands

# The only candidate where the shell knows better: it offers its files then.
FILE, DIRECTORY = ":file", ":directory"
_PATHS = {"FILE": FILE, "DIR": DIRECTORY, "-- PROGRAM ARGS": FILE}


class Line(NamedTuple):
    """What stands before the word that is to be completed.

    ``given`` are the command's arguments, ``options`` the options and their values by their ``dest``, and
    ``asked`` is the option whose value comes next.
    """

    command: str
    given: Sequence[str]
    options: Mapping[str, str]
    asked: argparse.Action | None


class Blank(NamedTuple):
    """What is to be filled in: ``kind`` is its name in the help, ``option`` the option that it is a value of;
    ``start`` is what of the value has been typed.
    """

    kind: str
    option: str
    start: str

    @property
    def words(self) -> list[str]:
        """The values that the help has for it."""
        return [] if self.kind == self.kind.upper() else self.kind.split("|")


class Fitting(Protocol):
    """Who knows what fits a line."""

    def found(self, blank: Blank) -> Iterable[str]:
        """What may be filled in, or the words of the blank. It need not begin with ``start``."""

    def is_offered(self, option: argparse.Action) -> bool:
        """Whether the option is of use there."""


def candidates(
    parser: argparse.ArgumentParser, words: Sequence[str], fitting: Callable[[Line], Fitting]
) -> list[str]:
    """All continuations of the last of ``words``, the ones before it being complete; or FILE or DIRECTORY."""
    *before, current = words or [""]
    line = _read(parser, before)
    here = subcommands(parser).get(line.command, parser)
    options = here._option_string_actions
    name, equals, _ = current.partition("=")
    start = f"{name}=" if equals else ""
    if line.asked is not None:
        start, blank = "", Blank(_kind(line.asked), line.asked.dest, current)
    elif name in options and equals:
        blank = Blank(_kind(options[name]), options[name].dest, current.removeprefix(start))
    elif current.startswith("-"):
        # Nothing is said twice; of two names of an option the long one is offered.
        rest = [option for option in dict.fromkeys(options.values()) if option.dest not in line.options]
        fits = fitting(line)
        names = [option.option_strings[-1] for option in rest if fits.is_offered(option)]
        return sorted(name for name in names if name.startswith(current))
    elif not line.command:
        names = [name for name, each in subcommands(parser).items() if _full_name(name, each) == name]
        return sorted(name for name in names if name.startswith(current))
    else:
        start, blank = "", Blank(_argument(here, len(line.given)), "", current)
    if blank.kind in _PATHS:
        return [_PATHS[blank.kind]]
    found = fitting(line).found(blank)
    return sorted(word for value in found if (word := f"{start}{value}").startswith(current))


def _full_name(name: str, command: argparse.ArgumentParser) -> str:
    """The command's own name, of which this may be a short form."""
    return command.get_default("command") or name


def _read(parser: argparse.ArgumentParser, before: Iterable[str]) -> Line:
    commands, here = subcommands(parser), parser
    command, asked = "", None
    given: list[str] = []
    options: dict[str, str] = {}
    for word in before:
        name, equals, value = word.partition("=")
        option = here._option_string_actions.get(name)
        if asked is not None:
            options[asked.dest], asked = word, None
        elif option is not None and equals:
            options[option.dest] = value
        elif option is not None and option.nargs == 0:
            options[option.dest] = str(option.const)
        elif option is not None:
            asked = option
        elif command and not word.startswith("-"):
            given.append(word)
        elif word in commands:
            here = commands[word]
            command = _full_name(word, here)
    return Line(command, given, options, asked)


def _kind(argument: argparse.Action) -> str:
    if argument.choices is not None:
        return "|".join(argument.choices)
    return str(argument.metavar or argument.dest.upper())


def _argument(parser: argparse.ArgumentParser, number: int) -> str:
    """What the help calls the argument with that number, counted from 0; empty if there is none."""
    arguments = [action for action in parser._actions if not action.option_strings]
    if arguments and arguments[-1].nargs in ("*", "+", argparse.REMAINDER):
        number = min(number, len(arguments) - 1)
    return _kind(arguments[number]) if number < len(arguments) else ""
