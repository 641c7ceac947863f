# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules as documents for export and import: as lines, and as JSON. `rulexml` has the XML form.

work web action=forward mode=auto ... comment=demo      (one line for each rule; # starts a comment)
{"version": 1, "forwards": [{"qube": "work", "name": "web", "rule": {"action": "forward", ...}}]}
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .errors import RuleError, TextError
from .options import Option, split
from .rules import ForwardRule, NamedRule
from .values import QubeName, RuleName, parse_qube_name, parse_rule_name

VERSION = 1
_WORD = re.compile(r"\S+")


class Read(NamedTuple):
    """A rule from a document; forms that do not say target or name leave them None."""

    target: QubeName | None
    name: RuleName | None
    rule: ForwardRule
    place: str


def within(place: str, error: RuleError) -> RuleError:
    """The same error, with the place around its own."""
    return RuleError(f"{place}, {error.place}", error.problem)


def rule_from_json(data: object, place: str) -> ForwardRule:
    """A rule from an object of option names and texts. Raises `RuleError`."""
    if not isinstance(data, Mapping):
        raise RuleError(place, "a rule is an object of option names and their values")
    for name, value in data.items():
        if not isinstance(value, str):
            raise RuleError(f"{place}, option {name!a}", f"{value!a} is not a text in quotes")
    try:
        return ForwardRule.from_options(Option(n, v, f"option {n!a}") for n, v in data.items())
    except RuleError as error:
        raise within(place, error) from None


def print_lines(rules: Iterable[NamedRule]) -> str:
    return "".join(f"{rule.target} {rule.name} {rule.rule}\n" for rule in rules)


def parse_lines(text: str) -> list[Read]:
    """Read what `print_lines` prints. Raises `RuleError` that names line and column."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        words = list(_WORD.finditer(line))
        if not words or words[0][0].startswith("#"):
            continue
        place = f"line {number}"
        if len(words) < 3:
            raise RuleError(place, "a line is the qube's name, the rule's name and the rule")
        target, name = _names(words[0][0], words[1][0], place)
        try:
            rule = ForwardRule.from_options(split(line, words[2].start()))
        except RuleError as error:
            raise within(place, error) from None
        found.append(Read(target, name, rule, place))
    return found


def as_json(rules: Iterable[NamedRule]) -> dict[str, Any]:
    forwards = [{"qube": r.target, "name": r.name, "rule": r.rule.options()} for r in rules]
    return {"version": VERSION, "forwards": forwards}


def parse_json(text: str) -> list[Read]:
    """Read the document that `as_json` makes. Raises `RuleError` that names forward and option."""
    import json

    try:
        data = json.loads(text, object_pairs_hook=_without_doubles)
    except RuleError:
        raise
    except ValueError as error:
        raise RuleError("document", f"not JSON: {error}") from None
    except RecursionError:
        raise RuleError("document", "not JSON that holds forwards: too deep") from None
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise RuleError("document", f'an export of version {VERSION} begins {{"version": {VERSION}, ...')
    forwards = data.get("forwards")
    if not isinstance(forwards, list) or data.keys() != {"version", "forwards"}:
        raise RuleError("document", 'besides "version" it has "forwards", a list, and nothing else')
    found = []
    for number, entry in enumerate(forwards, 1):
        place = f"forward {number}"
        if not isinstance(entry, dict) or entry.keys() != {"qube", "name", "rule"}:
            raise RuleError(place, 'a forward has "qube", "name" and "rule", and nothing else')
        if not isinstance(entry["qube"], str) or not isinstance(entry["name"], str):
            raise RuleError(place, '"qube" and "name" are texts in quotes')
        target, name = _names(entry["qube"], entry["name"], place)
        place = f"{place} ({target} {name})"
        found.append(Read(target, name, rule_from_json(entry["rule"], place), place))
    return found


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; Python's own would let the last of two equal keys win."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RuleError("document", f"the key {key!a} stands twice in one object")
        found[key] = value
    return found


def _names(qube: str, rule: str, place: str) -> tuple[QubeName, RuleName]:
    try:
        return parse_qube_name(qube), parse_rule_name(rule)
    except TextError as error:
        raise RuleError(place, str(error)) from None
