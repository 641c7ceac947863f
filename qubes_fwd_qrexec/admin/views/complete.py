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

_YES_NO = "yes|no"
# By the names of options in a rule. Those of `add` say in their help what their values are, but for these.
_VALUES = {"srchosts": "SOURCE", "expire": "8h|1d|never", "name": ""}
# Options of a rule that `add` lacks, or has under another name.
_RULE_VALUES = {"enabled": _YES_NO, "forwardtype": "|".join(ForwardType), "srchosts": "SOURCE"}


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
    kind = _argument(commands.get(command, parser), len(given))
    if asked is not None:
        kind = _values(asked)
    elif current.startswith("-"):
        names = "|".join(name for name in options if name.startswith("--"))
        kind = _values(options.get(prefix)) if equals else names
    elif not command:
        kind = "|".join(commands)
    elif kind == "OPTION=VALUE" and equals:
        kind = _RULE_VALUES.get(prefix) or _values(commands["add"]._option_string_actions.get(f"--{prefix}"))
    # What stands in capitals in the help is to be filled in.
    is_word = kind != kind.upper()
    found = kind.split("|") if is_word else _there_are(kind, command, given, lab, environ)
    return sorted(word for value in found if (word := f"{prefix}{equals}{value}").startswith(current))


def _argument(parser: argparse.ArgumentParser, number: int) -> str:
    """What the help calls the argument with that number, counted from 0; empty if there is none."""
    arguments = [action for action in parser._actions if not action.option_strings]
    kinds = [str(action.metavar) for action in arguments]
    if "NAME" in kinds:
        kinds[0] = "TARGET"
    if arguments and arguments[-1].nargs in ("*", "+"):
        number = min(number, len(kinds) - 1)
    return kinds[number] if number < len(kinds) else ""


def _values(option: argparse.Action | None) -> str:
    """What may stand after an option; of one without a value, what a rule's line has for it."""
    if option is None:
        return ""
    if option.choices is not None:
        return "|".join(option.choices)
    if option.nargs == 0:
        return _YES_NO
    return _VALUES.get(option.dest, str(option.metavar))


def _there_are(
    kind: str, command: str, given: Sequence[str], lab: str | None, environ: Mapping[str, str]
) -> Sequence[str]:
    """The qubes and rules that there are; none where they cannot be read."""
    if kind == "OPTION=VALUE":
        return [f"{option}=" for option in ForwardRule.option_names()]
    if kind not in ("QUBE", "TARGET", "NAME", "SOURCE"):
        return ()
    try:
        inventory = open_backend(lab, environ).inventory()
    except ForwardError:
        return ()
    qubes = inventory.qubes.values()
    if kind == "TARGET":
        return sorted({str(qube) for qube, _ in read_rules(inventory)})
    if kind == "SOURCE":
        return ["any", *(qube.name for qube in qubes if qube.netvm is not None)]
    if kind == "NAME":
        return names_at(read_rules(inventory), given[0])
    if command != "tunnel":
        return [qube.name for qube in qubes if qube.klass not in (ADMIN, TEMPLATE)]
    if given[0] == "mark":
        return [q.name for q in qubes if q.provides_network and not q.features.get(TUNNEL_FEATURE)]
    return [q.name for q in qubes if q.features.get(TUNNEL_FEATURE) and given[0] == "unmark"]
