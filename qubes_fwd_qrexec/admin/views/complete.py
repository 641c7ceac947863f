# SPDX-License-Identifier: GPL-2.0-or-later
"""What the shell may offer next, for completions/qvm-forward.bash: words in, candidates out.

The line is half typed: nothing here complains, and where nothing fits nothing is offered.
"""

import argparse
from collections.abc import Mapping, Sequence

from qubes_fwd_qrexec.admin.inventory import ADMIN, TEMPLATE, TUNNEL_FEATURE
from qubes_fwd_qrexec.admin.snapshot import names_at, read_rules
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.rules import ForwardRule, ForwardType

from .locate import open_backend
from .parser import commands_of

# What a command's arguments are, in their order; a last one with a * may be given again and again.
_ARGUMENTS = {
    "add": ("qube",),
    **dict.fromkeys(("list", "status", "plan", "export"), ("qube*",)),
    **dict.fromkeys(("show", "diagnose"), ("target", "name")),
    **dict.fromkeys(("remove", "enable", "disable", "confirm"), ("target", "name*")),
    "set": ("target", "name", "change*"),
    "tunnel": ("mark|unmark|list", "marked"),
}
_YES_NO = "yes|no"
# Anything else is the words themselves.
_KINDS = ("", "qube", "target", "name", "change", "marked")
_VALUES = {"srchosts": "any", "expire": "+8h|+1d|never"}
# Options of a rule that `add` lacks, or has under another name.
_RULE_VALUES = {"enabled": _YES_NO, "forwardtype": "|".join(ForwardType), "srchosts": "any"}


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
        elif word.startswith("--lab="):
            lab = word.removeprefix("--lab=")
        elif word.startswith("-"):
            option = commands.get(command, parser)._option_string_actions.get(word)
            asked = option if option is not None and option.nargs != 0 else None
        elif command:
            given.append(word)
        elif word in commands:
            command = word
    options = commands.get(command, parser)._option_string_actions
    prefix, equals, _ = current.rpartition("=")
    kind = _kind(command, len(given))
    if asked is not None:
        kind = _values(asked)
    elif current.startswith("-"):
        names = "|".join(name for name in options if name.startswith("--"))
        kind = _values(options.get(prefix)) if equals else names
    elif not command:
        kind = "|".join(commands)
    elif kind == "change" and equals:
        kind = _RULE_VALUES.get(prefix) or _values(commands["add"]._option_string_actions.get(f"--{prefix}"))
    found = _there_are(kind, given, lab, environ) if kind in _KINDS else kind.split("|")
    return sorted(word for value in found if (word := f"{prefix}{equals}{value}").startswith(current))


def _kind(command: str, number: int) -> str:
    """What the argument with that number is, counted from 0; empty if there is none."""
    kinds = _ARGUMENTS.get(command, ("",))
    kind = kinds[min(number, len(kinds) - 1)]
    return kind.removesuffix("*") if number < len(kinds) or kind.endswith("*") else ""


def _values(option: argparse.Action | None) -> str:
    """What may stand after an option; of one without a value, what a rule's line has for it."""
    if option is None:
        return ""
    if option.choices is not None:
        return "|".join(option.choices)
    if option.nargs == 0:
        return _YES_NO
    words = str(option.metavar)
    return words if "|" in words else "qube" if words == "QUBE" else _VALUES.get(option.dest, "")


def _there_are(kind: str, given: Sequence[str], lab: str | None, environ: Mapping[str, str]) -> Sequence[str]:
    """The qubes and rules that there are; none where they cannot be read."""
    if kind == "change":
        return [f"{option}=" for option in ForwardRule.option_names()]
    if not kind:
        return ()
    try:
        inventory = open_backend(lab, environ).inventory()
    except ForwardError:
        return ()
    qubes = inventory.qubes.values()
    if kind == "qube":
        return [qube.name for qube in qubes if qube.klass not in (ADMIN, TEMPLATE)]
    if kind == "target":
        return sorted({str(qube) for qube, _ in read_rules(inventory)})
    if kind == "name":
        return names_at(read_rules(inventory), given[0])
    if given[0] == "mark":
        return [q.name for q in qubes if q.provides_network and not q.features.get(TUNNEL_FEATURE)]
    return [q.name for q in qubes if q.features.get(TUNNEL_FEATURE) and given[0] == "unmark"]
