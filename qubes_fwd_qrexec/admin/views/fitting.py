# SPDX-License-Identifier: GPL-2.0-or-later
"""Which qubes, rules and values fit a half typed command line of qvm-forward; see `complete`."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from qubes_fwd_qrexec.admin.checks import judged
from qubes_fwd_qrexec.admin.editing import edited
from qubes_fwd_qrexec.admin.inventory import ADMIN, TEMPLATE, TUNNEL_FEATURE, Inventory
from qubes_fwd_qrexec.admin.snapshot import Stored, names_at, read_rules
from qubes_fwd_qrexec.admin.states import Cause, Forward, State
from qubes_fwd_qrexec.common.errors import ForwardError, RuleError
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.rules import (
    BrokenRule,
    ForwardRule,
    ForwardType,
    Mode,
    NamedRule,
    OnExpire,
    Proxy,
    Transport,
)
from qubes_fwd_qrexec.common.values import Proto, QubeName, RuleName

from . import parser
from .complete import Blank, Line, candidates
from .locate import open_backend

_YES_NO = ("yes", "no")
# The options of a rule that have one of a few values.
_CHOICES: Mapping[str, Sequence[str]] = {
    "mode": [*Mode],
    "forwardtype": [*ForwardType],
    "proto": [*Proto],
    "transport": [*Transport],
    "proxy": [*Proxy],
    "on-expire": [*OnExpire],
    **dict.fromkeys(("autostart", "enabled", "follow-netvm", "bypass-tunnel"), _YES_NO),
}
# Of the others, examples of what is often given.
_EXAMPLES = {"expire": ("8h", "1d", "never"), "expire+": ("1h", "1d")}
# What the commands write themselves.
_NOT_SET = {"action", "owner", "path", "ended"}
_SET_MORE = ("srchosts+", "srchosts-", "expire+")
# A rule of which nothing is known yet.
_ANY_RULE = "action=forward srcports=1-1 srchosts=any"


def complete(words: Sequence[str], environ: Mapping[str, str], now: float) -> list[str]:
    """What may come next on the line of qvm-forward with these words; ``now`` in UNIX seconds."""

    return candidates(parser.build(words), words, lambda line: _Fitting(line, environ, now))


class _Fitting:
    """What fits a line; nothing where the system cannot be read."""

    def __init__(self, line: Line, environ: Mapping[str, str], now: float) -> None:
        self._line = line
        self._environ = environ
        self._now = now

    def found(self, blank: Blank) -> Iterable[str]:
        try:
            return list(self._found(blank))
        except ForwardError:
            return blank.words

    def is_offered(self, option: argparse.Action) -> bool:
        name = option.dest.replace("_", "-")
        if self._line.command not in ("add", "set") or name not in {*_CHOICES, *_SET_MORE}:
            return True
        try:
            return self._is_useful(name, option.const)
        except ForwardError:
            return True

    @cached_property
    def _inventory(self) -> Inventory:
        return open_backend(self._line.options.get("lab"), self._environ).inventory()

    @cached_property
    def _stored(self) -> Stored:
        return read_rules(self._inventory)

    def _found(self, blank: Blank) -> Iterable[str]:
        command, given = self._line.command, self._line.given
        option = blank.option.replace("_", "-")
        if command == "set" and blank.kind == "OPTION=VALUE":
            option, equals, start = blank.start.partition("=")
            if not equals:
                return self._options()
            values = self._values(option, start)
            return [f"{option}={value}" for value in values]
        if option in ForwardRule.option_names() or option in _SET_MORE:
            return self._values(option, blank.start)
        if blank.kind == "QUBE":
            return [name for name in self._qubes() if name not in given]
        if blank.kind == "NAME" and not option and given:
            names = [
                name for name in names_at(self._stored, given[0]) if self._is_for(QubeName(given[0]), name)
            ]
            one = command == "set" and len(names) == 1
            if one and "=" in blank.start:
                return self._found(Blank("OPTION=VALUE", "", blank.start))
            return [*(name for name in names if name not in given[1:]), *(self._options() if one else ())]
        return blank.words

    def _qubes(self) -> Iterable[str]:
        command, given = self._line.command, self._line.given
        qubes = self._inventory.qubes.values()
        if command == "tunnel":
            is_marked = {"mark": False, "unmark": True}.get(given[0])
            return [
                qube.name
                for qube in qubes
                if bool(qube.features.get(TUNNEL_FEATURE)) is is_marked
                and (is_marked or qube.provides_network)
            ]
        arguments = {names[0] for names, _ in parser.COMMANDS[command].arguments}
        if command == "export" or arguments & {"name", "names"}:
            return dict.fromkeys(qube for qube, name in self._stored if self._is_for(qube, name))
        return [qube.name for qube in qubes if qube.klass not in (ADMIN, TEMPLATE)]

    def _is_for(self, target: QubeName, name: str) -> bool:
        """Whether the command can do anything to this rule."""
        fits = _FITS.get(self._line.command)
        entry = self._stored[target, name]
        if isinstance(entry, BrokenRule):
            return fits is None and self._line.command != "set"
        return fits is None or fits(judged(entry, self._inventory, self._now, ()))

    @cached_property
    def _rule(self) -> NamedRule | None:
        """The rule as what has been typed leaves it; None if there is none yet."""
        command, given = self._line.command, self._line.given
        if not given:
            return None
        target = QubeName(given[0])
        if command == "add":
            named = NamedRule(target, RuleName("new"), ForwardRule.parse(_ANY_RULE))
        else:
            names = [word for word in given[1:] if "=" not in word] or names_at(self._stored, target)
            entry = self._stored.get((target, names[0])) if len(names) == 1 else None
            if not isinstance(entry, NamedRule):
                return None
            named = entry
        return named._replace(rule=self._typed(named.rule))

    def _typed(self, rule: ForwardRule) -> ForwardRule:
        typed = {name.replace("_", "-"): value for name, value in self._line.options.items()}
        typed |= dict(word.split("=", 1) for word in self._line.given if "=" in word)
        for name, value in typed.items():
            rule = _changed(rule, name, value, self._now) or rule
        return rule

    def _options(self) -> Iterable[str]:
        """The options of a rule that `set` can change to something else."""
        typed = {word.partition("=")[0] for word in self._line.given}
        typed |= {name.replace("_", "-") for name in self._line.options}
        names = [name for name in (*ForwardRule.option_names(), *_SET_MORE) if name not in _NOT_SET | typed]
        return [f"{name}=" for name in names if self._is_useful(name)]

    def _is_useful(self, option: str, value: str | None = None) -> bool:
        """Whether an option has a value, or this one is one, that would change the rule as it is so far."""
        rule = self._rule and self._rule.rule
        if rule is None:
            return True
        if option == "expire+":
            return rule.expire is not None
        if option == "srchosts-":
            return len(str(rule.sources).split(",")) > 1
        if option == "srchosts+":
            return str(rule.sources) != "any"
        if option not in _CHOICES:
            return True
        values = self._values(option) if value is None else [value]
        return any(_changed(rule, option, each, self._now) not in (None, rule) for each in values)

    def _values(self, option: str, start: str = "") -> Iterable[str]:
        """The values of an option that go with the rule as it is so far."""
        if option in _EXAMPLES:
            return _EXAMPLES[option]
        if option == "via":
            return [qube.name for qube in self._inventory.qubes.values() if qube.provides_network]
        rule = self._rule and self._rule.rule
        if option.startswith("srchosts"):
            before = start[: start.rfind(",") + 1]
            return [
                f"{before}{name}" for name in self._sources(option, rule) if name not in before.split(",")
            ]
        values = _CHOICES.get(option, ())
        if self._rule is None or rule is None:
            return values
        fitting = [value for value in values if _changed(rule, option, value, self._now) is not None]
        if option != "mode":
            return fitting
        refusals = {mode: self._refusals(self._rule, mode) for mode in (Mode.NFT, Mode.QREXEC)}
        return [mode for mode in fitting if _is_possible(Mode(mode), refusals)]

    def _sources(self, option: str, rule: ForwardRule | None) -> Iterable[str]:
        if option == "srchosts-":
            return [] if rule is None else str(rule.sources).split(",")
        qubes = [qube.name for qube in self._inventory.qubes.values() if qube.netvm is not None]
        # With `add`, --internal may still follow.
        is_external = rule is not None and rule.forward_type is ForwardType.EXTERNAL
        names = [] if is_external and self._line.command == "set" else qubes
        return names if option == "srchosts+" else ["any", *names]

    def _refusals(self, named: NamedRule, mode: Mode) -> set[Cause] | None:
        """What refuses the rule by this mode; None if its options do not go with it."""
        try:
            named = named._replace(rule=replace(named.rule, mode=mode))
        except RuleError:
            return None
        stops = judged(named, self._inventory, self._now, ()).stops
        return {stop.cause for stop in stops if stop.cause.state is State.REFUSED}


def _is_possible(mode: Mode, refusals: Mapping[Mode, set[Cause] | None]) -> bool:
    """Whether nothing refuses this mode that would not refuse the other one, too."""
    if mode is Mode.AUTO:
        return True
    own, other = refusals[mode], refusals[Mode.QREXEC if mode is Mode.NFT else Mode.NFT]
    return other is None or (own is not None and own <= other)


def _changed(rule: ForwardRule, option: str, value: str, now: float) -> ForwardRule | None:
    """A rule with an option changed; None if the option does not go with the others."""
    try:
        return edited(rule, [Option(option, value, "")], now)
    except RuleError:
        return None


_FITS: Mapping[str, Callable[[Forward], bool]] = {
    "enable": lambda forward: not forward.named.rule.enabled,
    "disable": lambda forward: forward.named.rule.enabled,
    "confirm": lambda forward: any(stop.cause.state is State.SUSPENDED for stop in forward.stops),
    "cut": lambda forward: not forward.stops,
}
