# SPDX-License-Identifier: GPL-2.0-or-later
"""The system as it was read, once: its qubes, the rules stored there, and dom0's policy file.

A rule is stored as feature ``forward.NAME`` of its target, whose value is the rule's line.
"""

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import RefusedError, RuleError, StoreError, TextError
from qubes_fwd_qrexec.common.nearest import did_you_mean
from qubes_fwd_qrexec.common.rules import BrokenRule, ForwardRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName, parse_rule_name

from . import policy
from .backend import ANY, NEW, Backend, PolicyFile
from .inventory import RULE_PREFIX, TUNNEL_FEATURE, Inventory
from .plan import plan
from .states import Key, Plan

# TUNNEL_FEATURE marks a tunnel qube, so no rule can have this name.
TUNNEL_NAME = TUNNEL_FEATURE.removeprefix(RULE_PREFIX)
# More than a system has; a rule takes some KiB.
_RULES_KEPT = 2048

NewLines = Mapping[Key, str | None]
"""New lines of rules by qube and name, or None to remove one. `TUNNEL_NAME` stands for a qube's mark."""


Stored = Mapping[Key, NamedRule | BrokenRule]
"""All that is stored as rules, readable or not, in the order of target and name."""


class ByName(NamedTuple):
    """The rules of a qube, or of all qubes, that have these names or match them, such as ``web-*``; without
    names the only one. ``*`` may match none.
    """

    target: str | None
    names: Collection[str] = ()


Which = ByName | Collection[Key]
"""Some of the stored rules: by names and patterns, or exactly these."""


def read_rules(inventory: Inventory) -> Stored:
    """The rules of all qubes; what cannot be read as one is kept as broken, never dropped."""
    return {
        (target, name): read_rule(target, name, untrusted_line)
        for target in sorted(inventory.qubes)
        for key, untrusted_line in sorted(inventory.qubes[target].features.items())
        if key.startswith(RULE_PREFIX) and (name := key.removeprefix(RULE_PREFIX)) != TUNNEL_NAME
    }


def names_at(stored: Stored, target: str) -> list[str]:
    """The names of all that is stored at a qube."""
    return [name for qube, name in stored if qube == target]


@lru_cache(_RULES_KEPT)
def read_rule(target: QubeName, untrusted_name: str, untrusted_line: str) -> NamedRule | BrokenRule:
    """One stored rule. What `watch` and the window read again and again is parsed once."""
    try:
        return NamedRule(target, parse_new_name(untrusted_name), ForwardRule.parse(untrusted_line))
    except (TextError, RuleError) as error:
        return BrokenRule(target, untrusted_name, untrusted_line, str(error))


def parse_new_name(text: str) -> RuleName:
    """A name that a rule can be stored under. Raises `TextError`."""
    if text == TUNNEL_NAME:
        raise TextError(text, f"a free name for a rule: the feature {TUNNEL_FEATURE} marks a tunnel qube")
    return parse_rule_name(text)


def made_up_name(rule: ForwardRule, taken: Iterable[str]) -> RuleName:
    """``tcp-80`` or ``both-80-90``, with a number behind if that is taken."""
    base = f"{rule.proto}-{rule.listen_ports.brief()}"
    names = set(taken)
    name, number = base, 1
    while name in names:
        number += 1
        # A range of five digits leaves one or none of the 16 characters, so its end may go.
        name = f"{base[: 16 - len(str(number)) - 1]}-{number}"
    return parse_rule_name(name)


class Snapshot(NamedTuple):
    """What the system was when it was read; ``installed`` is dom0's policy file."""

    inventory: Inventory
    stored: Stored
    installed: PolicyFile = PolicyFile(None, NEW)

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be read."""
        found = (self.installed.problem, *(qube.problem for qube in self.inventory.qubes.values()))
        return tuple(text for text in found if text is not None)

    @property
    def is_held(self) -> bool:
        """Whether dom0's policy says that everything is held."""
        return policy.is_held(self.installed.text)

    def plan(
        self,
        now: float,
        newcomers: Collection[Key] = (),
        *,
        is_held: bool | None = None,
        known: Plan | None = None,
    ) -> Plan:
        """What the rules ask for. ``is_held`` overrides what dom0's policy says of the hold; ``known`` is an
        earlier plan, which spares most of the work if little has changed since.
        """
        stock = policy.stock_targets(self.installed.text)
        planned = plan(
            self.stored.values(), self.inventory, now, newcomers=newcomers, stock=stock, known=known
        )
        return planned.held() if (self.is_held if is_held is None else is_held) else planned

    def changed(self, changes: NewLines) -> "Snapshot":
        """The system as it would be with some rules and marks changed; their qubes must exist."""
        qubes = dict(self.inventory.qubes)
        for (qube, name), value in changes.items():
            features = {key: text for key, text in qubes[qube].features.items() if key != RULE_PREFIX + name}
            if value is not None:
                features[RULE_PREFIX + name] = value
            qubes[qube] = qubes[qube]._replace(features=features)
        stored = {key: entry for key, entry in self.stored.items() if key not in changes}
        for (qube, name), value in changes.items():
            if value is not None and name != TUNNEL_NAME:
                stored[qube, name] = read_rule(qube, name, value)
        inventory = self.inventory._replace(qubes=qubes)
        return self._replace(inventory=inventory, stored=dict(sorted(stored.items())))

    def check_qube(self, name: str) -> QubeName:
        """The qube of that name. Raises `RefusedError` if there is none."""
        qube = self.inventory.get(name)
        if qube is None:
            near = did_you_mean(name, self.inventory.qubes) or "; 'qvm-ls' lists all qubes"
            raise RefusedError(f"there is no qube {name!a}{near}")
        return qube.name

    def find(self, target: str, name: str | None) -> NamedRule | BrokenRule:
        """A stored rule; without a name the only one of its qube. Raises `RefusedError`, which lists the
        forwards that the qube does have.
        """
        qube = self.check_qube(target)
        names = names_at(self.stored, qube)
        if name in names or (name is None and len(names) == 1):
            return self.stored[qube, name or names[0]]
        if not names:
            raise RefusedError(f"{qube} has no forwards; 'qvm-forward list' shows those of all qubes")
        listed = ", ".join(ascii(known)[1:-1] for known in names)
        if name is None:
            raise RefusedError(f"{qube} has {len(names)} forwards; name one of {listed}")
        raise RefusedError(f"{qube} has no forward {name!a}, only {listed}{did_you_mean(name, names)}")

    def chosen(self, which: Which) -> list[NamedRule | BrokenRule]:
        """Some of the rules. Raises `RefusedError` as `find` does."""
        if not isinstance(which, ByName):
            return [self.find(*key) for key in which]
        target, names = which
        qubes = self.inventory.qubes if target is None else (self.check_qube(target),)
        found: dict[Key, NamedRule | BrokenRule] = {}
        for qube in qubes:
            known = names_at(self.stored, qube)
            for name in names or (None,):
                some = fnmatch.filter(known, name or "")
                if not some and name != "*":
                    some = [self.find(qube, name).name]
                found |= {(qube, each): self.stored[qube, each] for each in some}
        return list(found.values())


def look(backend: Backend, *, with_config: bool = False) -> Snapshot:
    """Read the system; with ``with_config`` also what listeners have been told. Raises `StoreError`."""
    # Policy first: its token then shows that somebody closed it while the qubes were being read.
    try:
        installed = backend.read_policy()
    except StoreError as error:
        installed = PolicyFile(None, ANY, str(error))
    inventory = backend.inventory(with_config=with_config)
    return Snapshot(inventory, read_rules(inventory), installed)
