# SPDX-License-Identifier: GPL-2.0-or-later
"""What the shell may offer next, for completions/qvm-forward.bash: words in, candidates out.

The words come from a line half typed: nothing here complains, and where nothing fits nothing is said.
"""

import argparse
from collections.abc import Mapping, Sequence

from qubes_fwd_qrexec.admin.inventory import ADMIN, TEMPLATE, TUNNEL_FEATURE
from qubes_fwd_qrexec.admin.locate import open_backend
from qubes_fwd_qrexec.admin.snapshot import Snapshot
from qubes_fwd_qrexec.admin.store import read_rules
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.rules import ForwardRule, ForwardType, Mode, OnExpire, Proto, Proxy, Transport

from .parser import TUNNEL_ACTIONS, commands_of

_VALUES: dict[str, tuple[str, ...]] = {
    "mode": tuple(Mode),
    "proto": tuple(Proto),
    "transport": tuple(Transport),
    "proxy": tuple(Proxy),
    "on_expire": tuple(OnExpire),
    "sources": ("any",),
    "expire": ("+8h", "+1d", "never"),
}
_YES_NO = ("yes", "no")
# Of the options of a rule, by their names there.
_RULE_VALUES: dict[str, tuple[str, ...]] = {
    **{dest.replace("_", "-"): values for dest, values in _VALUES.items() if dest != "sources"},
    "forwardtype": tuple(ForwardType),
    "srchosts": ("any",),
    **dict.fromkeys(("autostart", "enabled", "follow-netvm", "bypass-tunnel"), _YES_NO),
}


def candidates(
    parser: argparse.ArgumentParser, words: Sequence[str], environ: Mapping[str, str]
) -> list[str]:
    """All continuations of the last of ``words``, the ones before it being complete."""
    *before, current = words or [""]
    lab: str | None = None
    asked: argparse.Action | None = None
    positionals: list[str] = []
    active = parser
    for word in before:
        if asked is not None:
            if asked.dest == "lab":
                lab = word
            asked = None
        elif word.startswith("-"):
            name, equals, value = word.partition("=")
            action = active._option_string_actions.get(name)
            if action is not None and equals and action.dest == "lab":
                lab = value
            if action is not None and not equals and action.nargs != 0:
                asked = action
        elif active is parser:
            active = commands_of(parser).get(word, parser)
        else:
            positionals.append(word)
    found = _offered(parser, active, asked, positionals, current, lab, environ)
    return sorted(word for word in found if word.startswith(current))


def _offered(
    parser: argparse.ArgumentParser,
    active: argparse.ArgumentParser,
    asked: argparse.Action | None,
    positionals: Sequence[str],
    current: str,
    lab: str | None,
    environ: Mapping[str, str],
) -> Sequence[str]:
    if asked is not None:
        return _of_option(asked, lab, environ)
    option, equals, _ = current.partition("=")
    if current.startswith("-"):
        known = active._option_string_actions
        if equals:
            return (
                [f"{option}={value}" for value in _of_option(known[option], lab, environ)]
                if option in known
                else ()
            )
        return [name for name in known if name.startswith("--")]
    commands = commands_of(parser)
    if active is parser:
        return tuple(commands)
    command = next(name for name, one in commands.items() if one is active)
    takes_names = any(action.dest == "name" and not action.option_strings for action in active._actions)
    takes_qubes = any(action.dest == "qube" and not action.option_strings for action in active._actions)
    if command == "tunnel":
        if not positionals:
            return TUNNEL_ACTIONS
        return _tunnel_qubes(positionals[0], lab, environ) if len(positionals) == 1 else ()
    if takes_qubes and (not positionals or not (takes_names or command == "add")):
        return _qubes(command, lab, environ)
    if takes_names and (len(positionals) == 1 or command not in ("set", "show", "diagnose")):
        return _names(positionals[0], lab, environ)
    if command == "set" and equals:
        values = _qubes("add", lab, environ) if option == "via" else _RULE_VALUES.get(option, ())
        return [f"{option}={value}" for value in values]
    if command == "set":
        return [f"{name}=" for name in ForwardRule.option_names()]
    return ()


def _of_option(option: argparse.Action, lab: str | None, environ: Mapping[str, str]) -> Sequence[str]:
    if option.choices is not None:
        return tuple(map(str, option.choices))
    if option.dest in ("via", "qube"):
        return _qubes("add", lab, environ)
    return _VALUES.get(option.dest, ())


def _look(lab: str | None, environ: Mapping[str, str]) -> Snapshot | None:
    try:
        inventory = open_backend(lab, environ).inventory()
    except ForwardError:
        return None
    return Snapshot(inventory, read_rules(inventory))


def _qubes(command: str, lab: str | None, environ: Mapping[str, str]) -> list[str]:
    """The qubes that the command can be about."""
    snapshot = _look(lab, environ)
    if snapshot is None:
        return []
    if command in ("add", "list", "status", "plan", "export"):
        return [q.name for q in snapshot.inventory.qubes.values() if q.klass not in (ADMIN, TEMPLATE)]
    return list(snapshot.stored.targets())


def _tunnel_qubes(action: str, lab: str | None, environ: Mapping[str, str]) -> list[str]:
    """To mark: netvms without our mark; to unmark: what has it."""
    snapshot = _look(lab, environ)
    if snapshot is None or action not in ("mark", "unmark"):
        return []
    qubes = snapshot.inventory.qubes.values()
    if action == "unmark":
        return [qube.name for qube in qubes if qube.features.get(TUNNEL_FEATURE)]
    return [q.name for q in qubes if q.provides_network and not q.features.get(TUNNEL_FEATURE)]


def _names(target: str, lab: str | None, environ: Mapping[str, str]) -> list[str]:
    snapshot = _look(lab, environ)
    return [] if snapshot is None else snapshot.stored.names(target)
