# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules as documents for export and import: as lines, and as JSON. `rulexml` and `ruleyaml` have other forms.

version 2                                               (one line for each; # starts a comment)
sys-vpn tunnel yes
work web action=forward mode=auto ... comment=demo

{"version": 2, "tunnels": {"sys-vpn": true},
 "forwards": [{"qube": "work", "name": "web", "rule": {"action": "forward", ...}}]}

It includes the marks of tunnels: without them the same rules would give another plan. A document with
version 2 is an export. Lines without a version, and version 1, are older or written by hand, and so are
rules without a qube, in the forms of 2021. If a rule has no owner or path, import finds them, in any kind
of document.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from .clients import Clients
from .errors import RuleError, TextError
from .options import Option, split
from .rules import ForwardRule, NamedRule
from .values import QubeName, RuleName, parse_qube_name, parse_rule_name, parse_yes_no, yes_no

VERSION = 2
# It has no marks of tunnels, and is less strict.
OLDER = 1
_TUNNEL = "tunnel"
_ANYBODY = Clients.parse("any")
_WORD = re.compile(r"\S+")


class Read(NamedTuple):
    """A rule from a document; ``target`` and ``name`` are None in forms that do not have them."""

    target: QubeName | None
    name: RuleName | None
    rule: ForwardRule
    place: str


class Document(NamedTuple):
    """Rules, marks of tunnels by qube, and how many rules of other actions were left out.

    ``is_export``: whether it says that it is complete, with everything that existed when it was made.
    """

    rules: list[Read]
    tunnels: Mapping[QubeName, bool]
    is_export: bool
    skipped: int = 0


def within(place: str, error: RuleError) -> RuleError:
    """The same error, with an outer place added to its own."""
    return RuleError(f"{place}, {error.place}", error.problem, *error.options)


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


def joined(rules: Iterable[Read]) -> list[Read]:
    """Join rules of 2021, which had one network each: rules that differ only in the network become one."""
    found: dict[ForwardRule, list[Read]] = {}
    for read in rules:
        rest = replace(read.rule, sources=_ANYBODY, comment="")
        found.setdefault(rest, []).append(read)
    return [_joined(alike) for alike in found.values()]


def _joined(alike: list[Read]) -> Read:
    first = alike[0]
    comments = dict.fromkeys(read.rule.comment for read in alike if read.rule.comment)
    try:
        sources = Clients.union(read.rule.sources for read in alike)
    except TextError as error:
        raise RuleError(first.place, str(error)) from None
    return first._replace(rule=replace(first.rule, sources=sources, comment="; ".join(comments)))


def print_lines(rules: Iterable[NamedRule], tunnels: Mapping[QubeName, bool]) -> str:
    """The form of one line for each mark and rule."""
    marks = [f"{qube} {_TUNNEL} {yes_no(is_marked)}\n" for qube, is_marked in tunnels.items()]
    return "".join(
        (f"version {VERSION}\n", *marks, *(f"{rule.target} {rule.name} {rule.rule}\n" for rule in rules))
    )


def parse_lines(text: str) -> Document:
    """Parse what `print_lines` prints, and lines of 2021, which begin with the action.

    Raises `RuleError` that names the line and the column.
    """
    found, nameless, skipped, is_export = [], [], 0, False
    tunnels: dict[QubeName, bool] = {}
    is_first = True
    for number, line in enumerate(text.split("\n"), 1):
        words = list(_WORD.finditer(line))
        if not words or words[0][0].startswith("#"):
            continue
        place = f"line {number}"
        texts = [word[0] for word in words]
        if is_first and len(texts) == 2 and texts[0] == "version":
            if texts[1] != str(VERSION):
                raise RuleError(place, f"this program reads version {VERSION} and not {texts[1]!a}")
            is_export = True
        elif texts[0].startswith("action="):
            if texts[0] == "action=forward":
                nameless.append(Read(None, None, _line_rule(line, 0, place), place))
            else:
                skipped += 1
        elif len(words) < 3:
            raise RuleError(place, "a line is the qube's name, the rule's name and the rule")
        elif texts[1] == _TUNNEL:
            add_mark(tunnels, texts[0], " ".join(texts[2:]), place)
        else:
            target, name = _names(texts[0], texts[1], place)
            found.append(Read(target, name, _line_rule(line, words[2].start(), place), place))
        is_first = False
    return Document([*found, *joined(nameless)], tunnels, is_export, skipped)


def _line_rule(line: str, start: int, place: str) -> ForwardRule:
    try:
        return ForwardRule.from_options(split(line, start))
    except RuleError as error:
        raise within(place, error) from None


def add_mark(tunnels: dict[QubeName, bool], untrusted_qube: str, untrusted_mark: str, place: str) -> None:
    """Add the mark of a qube, which may be there only once. Raises `RuleError`."""
    try:
        qube = parse_qube_name(untrusted_qube)
        is_marked = parse_yes_no(untrusted_mark)
    except TextError as error:
        raise RuleError(place, f"{error}; the name tunnel stands for the mark of a tunnel qube") from None
    if qube in tunnels:
        raise RuleError(place, f"says again whether {qube} is marked as a tunnel")
    tunnels[qube] = is_marked


def as_json(rules: Iterable[NamedRule], tunnels: Mapping[QubeName, bool]) -> dict[str, Any]:
    """The document for JSON."""
    forwards = [{"qube": r.target, "name": r.name, "rule": r.rule.options()} for r in rules]
    return {"version": VERSION, "tunnels": dict(tunnels), "forwards": forwards}


def parse_json(text: str) -> Document:
    """Parse what `as_json` returns, as text. Raises `RuleError` that names the forward and the option."""
    import json

    try:
        data = json.loads(text, object_pairs_hook=without_doubles)
    except RuleError:
        raise
    except ValueError as error:
        raise RuleError("document", f"not JSON: {error}") from None
    except RecursionError:
        raise RuleError("document", "not JSON that holds forwards: too deep") from None
    return parse_data(data)


def parse_data(data: Any) -> Document:
    """Parse what `as_json` returns. Raises `RuleError` that names the forward and the option."""
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is not int or version not in (OLDER, VERSION):
        raise RuleError("document", f'an export of version {VERSION} has "version": {VERSION}')
    tunnels = data.get("tunnels") if version == VERSION else {}
    if not isinstance(tunnels, dict):
        raise RuleError("document", 'it has "tunnels", an object of qubes and true or false')
    forwards = data.get("forwards")
    known = {"version", "forwards"} | ({"tunnels"} if version == VERSION else set())
    if not isinstance(forwards, list) or data.keys() != known:
        besides = _quoted(known - {"forwards"})
        raise RuleError("document", f'besides {besides} it has "forwards", a list, and nothing else')
    return Document(_json_rules(forwards), _json_marks(tunnels), version == VERSION)


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(f'"{name}"' for name in sorted(names))


def _json_marks(tunnels: Mapping[str, object]) -> dict[QubeName, bool]:
    found: dict[QubeName, bool] = {}
    for qube, is_marked in tunnels.items():
        if not isinstance(is_marked, bool):
            raise RuleError(f"tunnel {qube!a}", "is true or false")
        add_mark(found, qube, yes_no(is_marked), f"tunnel {qube!a}")
    return found


def _json_rules(forwards: Iterable[object]) -> list[Read]:
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


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, and refuse equal keys, of which Python would keep the last one."""
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
