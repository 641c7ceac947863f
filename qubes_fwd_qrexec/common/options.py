# SPDX-License-Identifier: GPL-2.0-or-later
"""A line of ``name=value`` options, the one text form that rules and configurations share.

Options are separated by single spaces, as in Qubes firewall rules; ``comment`` takes the rest of its line. A
table of `Form` says which options there are, and what each may contain; anything else is a `RuleError` that
names the option and its place.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from .errors import RuleError, TextError
from .nearest import did_you_mean


class Option(NamedTuple):
    """One option as it was found; ``place`` says where, for error messages."""

    name: str
    value: str
    place: str


class Form(NamedTuple):
    """How one option is parsed and printed, and which field of the value it fills.

    ``merge`` joins the values of options that may fill the same field; without it a second one is an error.
    """

    field: str
    parse: Callable[[str], Any]
    print: Callable[[Any], str] = str
    merge: Callable[[Any, Any], Any] | None = None


def split(line: str, start: int = 0) -> Iterator[Option]:
    """Yield the options of a line from ``start`` on.

    Raises `RuleError` that names the column, counted from 1.
    """
    column = start
    while column < len(line):
        end = line.find(" ", column)
        if end < 0 or line.startswith("comment=", column):
            end = len(line)
        name, equals, value = line[column:end].partition("=")
        if not equals:
            problem = "an option is written name=value" if name else "two spaces in a row"
            raise RuleError(f"{name!a} at column {column + 1}", problem)
        yield Option(name, value, f"option {name!a} at column {column + 1}")
        if end == len(line) - 1:
            raise RuleError(f"column {len(line)}", "a space at the end of the line")
        column = end + 1


def read(options: Iterable[Option], forms: Mapping[str, Form]) -> dict[str, Any]:
    """Parse options into fields and values. Raises `RuleError` for unknown, repeated or invalid ones."""
    fields: dict[str, Any] = {}
    filled_by: dict[str, Option] = {}
    for option in options:
        form = forms.get(option.name)
        if form is None:
            raise unknown(option, forms)
        try:
            value = form.parse(option.value)
        except TextError as error:
            raise RuleError(option.place, str(error), option.name) from None
        earlier = filled_by.get(form.field)
        if earlier is not None:
            if earlier.name == option.name or form.merge is None or forms[earlier.name].merge is None:
                raise RuleError(option.place, f"repeats {earlier.place}", option.name)
            try:
                value = form.merge(fields[form.field], value)
            except TextError as error:
                raise RuleError(option.place, str(error), option.name) from None
        fields[form.field] = value
        filled_by[form.field] = option
    return fields


def unknown(option: Option, known: Collection[str]) -> RuleError:
    """The error about an unknown option; ``known`` are those that exist."""
    what = did_you_mean(option.name, known) or f"; known are {', '.join(known)}"
    return RuleError(option.place, f"unknown option{what}", option.name)


def one_of(kind: type[StrEnum]) -> Callable[[str], StrEnum]:
    """A parser for one word of ``kind``; it raises `TextError` that lists the words."""

    def parse(text: str) -> StrEnum:
        try:
            return kind(text)
        except ValueError:
            raise TextError(text, f"one of {', '.join(kind)}") from None

    return parse
