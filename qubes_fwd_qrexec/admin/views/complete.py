# SPDX-License-Identifier: GPL-2.0-or-later
"""What the shell may offer next, for completions/qvm-forward.bash: words in, candidates out.

The line is half typed: nothing here complains, and where nothing fits nothing is offered.
"""

import argparse
from collections.abc import Mapping, Sequence

from qubes_fwd_qrexec.admin.inventory import ADMIN, TEMPLATE, TUNNEL_FEATURE
from qubes_fwd_qrexec.admin.locate import open_backend
from qubes_fwd_qrexec.admin.store import read_rules
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.rules import ForwardRule, ForwardType

from .parser import commands_of

_REPEATED = "*"
# What a command's arguments are, in their order; a last one with a * may be given again and again.
_ARGUMENTS = {
    "add": ("qube",),
    **dict.fromkeys(("list", "status", "export"), ("qube*",)),
    **dict.fromkeys(("show", "diagnose"), ("target", "name")),
    **dict.fromkeys(("remove", "enable", "disable", "confirm"), ("target", "name*")),
    "set": ("target", "name", "change*"),
    "tunnel": ("mark|unmark|list", "marked"),
}
_YES_NO = ("yes", "no")
_VALUES = {"sources": ("any",), "expire": ("+8h", "+1d", "never")}
# Options of a rule that are none of `add`, or are called otherwise there.
_RULE_VALUES = {"enabled": _YES_NO, "forwardtype": tuple(ForwardType), "srchosts": ("any",)}


def candidates(
    parser: argparse.ArgumentParser, words: Sequence[str], environ: Mapping[str, str]
) -> list[str]:
    """All continuations of the last of ``words``, the ones before it being complete."""
    *before, current = words or [""]
    commands = commands_of(parser)
    command, lab, asked, given = "", None, None, []
    for word in before:
        if asked is not None:
            lab, asked = (word if asked.dest == "lab" else lab), None
        elif word.startswith("-"):
            name, _, value = word.partition("=")
            option = _option(commands.get(command, parser), name)
            if value and name == "--lab":
                lab = value
            elif not value and option is not None and option.nargs != 0:
                asked = option
        elif command:
            given.append(word)
        else:
            command = word if word in commands else ""
    active, system = commands.get(command, parser), _System(lab, environ)
    name, equals, _ = current.partition("=")
    found: Sequence[str]
    if asked is not None:
        found = _values(asked, system)
    elif name.startswith("-") and equals:
        found = [f"{name}={value}" for value in _values(_option(active, name), system)]
    elif name.startswith("-"):
        found = [option for option in active._option_string_actions if option.startswith("--")]
    elif not command:
        found = tuple(commands)
    else:
        kind = _kind(command, len(given))
        if kind == "change" and equals:
            values = _RULE_VALUES.get(name) or _values(_option(commands["add"], f"--{name}"), system)
            found = [f"{name}={value}" for value in values]
        else:
            found = system.arguments(kind, given)
    return sorted(word for word in found if word.startswith(current))


def _kind(command: str, number: int) -> str:
    """What the argument with that number is, counted from 0; empty if there is none."""
    kinds = _ARGUMENTS.get(command, ("",))
    kind = kinds[min(number, len(kinds) - 1)]
    return kind.removesuffix(_REPEATED) if number < len(kinds) or kind.endswith(_REPEATED) else ""


def _option(parser: argparse.ArgumentParser, name: str) -> argparse.Action | None:
    return parser._option_string_actions.get(name)


class _System:
    """The qubes and rules that there are; none where they cannot be read."""

    def __init__(self, lab: str | None, environ: Mapping[str, str]) -> None:
        self._lab = lab
        self._environ = environ

    def arguments(self, kind: str, given: Sequence[str]) -> Sequence[str]:
        """What an argument of that kind can be, after those that were given."""
        if kind == "change":
            return [f"{option}=" for option in ForwardRule.option_names()]
        if not kind:
            return ()
        if "|" in kind:
            return kind.split("|")
        try:
            inventory = open_backend(self._lab, self._environ).inventory()
        except ForwardError:
            return ()
        qubes = inventory.qubes.values()
        if kind == "qube":
            return [qube.name for qube in qubes if qube.klass not in (ADMIN, TEMPLATE)]
        if kind == "target":
            return [str(qube) for qube in read_rules(inventory).targets()]
        if kind == "name":
            return read_rules(inventory).names(given[0])
        if given[0] == "mark":
            return [q.name for q in qubes if q.provides_network and not q.features.get(TUNNEL_FEATURE)]
        return [q.name for q in qubes if q.features.get(TUNNEL_FEATURE) and given[0] == "unmark"]


def _values(option: argparse.Action | None, system: _System) -> Sequence[str]:
    """What may stand after an option; of one without a value what a rule's line has for it."""
    if option is None or option.choices is not None:
        return () if option is None else tuple(map(str, option.choices or ()))
    if option.metavar == "QUBE":
        return system.arguments("qube", ())
    if option.nargs == 0:
        return _YES_NO
    words = str(option.metavar).split("|")
    return words if len(words) > 1 else _VALUES.get(option.dest, ())
