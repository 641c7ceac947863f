# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules where they are stored: feature ``forward.NAME`` of the target, whose value is the rule's line."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import RuleError, StoreError, TextError
from qubes_fwd_qrexec.common.rules import BrokenRule, ForwardRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName, parse_rule_name

from .backend import Backend
from .inventory import TUNNEL_FEATURE, Inventory

PREFIX = "forward."
# TUNNEL_FEATURE marks a tunnel qube, so no rule can have this name.
TUNNEL_NAME = TUNNEL_FEATURE.removeprefix(PREFIX)

Changes = Mapping[tuple[QubeName, str], str | None]
"""New lines of rules by qube and name, or None to remove one. `TUNNEL_NAME` stands for a qube's mark."""


class Stored(NamedTuple):
    """All that is stored as rules, in the order of target and name."""

    rules: tuple[NamedRule, ...]
    broken: tuple[BrokenRule, ...]

    def find(self, target: str, name: str) -> NamedRule | BrokenRule | None:
        entries: Iterable[NamedRule | BrokenRule] = chain(self.rules, self.broken)
        for entry in entries:
            if entry.target == target and entry.name == name:
                return entry
        return None

    def names(self, target: str) -> list[str]:
        """The names of all that is stored at a qube, readable or not."""
        rules = [rule.name for rule in self.rules if rule.target == target]
        return [*rules, *(rule.name for rule in self.broken if rule.target == target)]

    def targets(self) -> list[QubeName]:
        """The qubes at which anything is stored."""
        return sorted({rule.target for rule in self.rules} | {rule.target for rule in self.broken})


def feature_key(name: str) -> str:
    return f"{PREFIX}{name}"


def read_rules(inventory: Inventory) -> Stored:
    """The rules of all qubes; what cannot be read as one is kept as broken, never dropped."""
    rules: list[NamedRule] = []
    broken: list[BrokenRule] = []
    for target in sorted(inventory.qubes):
        for key, untrusted_line in sorted(inventory.qubes[target].features.items()):
            if key.startswith(PREFIX) and key != TUNNEL_FEATURE:
                entry = read_rule(target, key.removeprefix(PREFIX), untrusted_line)
                if isinstance(entry, NamedRule):
                    rules.append(entry)
                else:
                    broken.append(entry)
    return Stored(tuple(rules), tuple(broken))


def read_rule(target: QubeName, untrusted_name: str, untrusted_line: str) -> NamedRule | BrokenRule:
    """One stored rule."""
    try:
        return NamedRule(target, parse_new_name(untrusted_name), ForwardRule.parse(untrusted_line))
    except (TextError, RuleError) as error:
        return BrokenRule(target, untrusted_name, untrusted_line, str(error))


def parse_new_name(text: str) -> RuleName:
    """A name that a rule can be stored under. Raises `TextError`."""
    if text == TUNNEL_NAME:
        raise TextError(text, f"free as a rule's name: the feature {feature_key(text)} marks a tunnel qube")
    return parse_rule_name(text)


def made_up_name(rule: ForwardRule, taken: Iterable[str]) -> RuleName:
    """``tcp-80`` or ``tcp-80-90``, with a number behind if that is taken."""
    base = f"{rule.proto}-{rule.listen_ports.brief()}"
    names = set(taken)
    name, number = base, 1
    while name in names:
        number += 1
        # tcp-60000-60010 leaves one digit of the 16; a tenth such rule may well be named by the user.
        name = f"{base[: 16 - len(str(number)) - 1]}-{number}"
    return parse_rule_name(name)


def store(backend: Backend, inventory: Inventory, changes: Changes) -> None:
    """Make all of the changes, or on an error none.

    On an error each is put back to what it was in ``inventory``. The caller holds the lock. Raises
    `StoreError`, which lists what could not be put back, and what to do about it.
    """
    tried: list[tuple[QubeName, str]] = []
    try:
        for (qube, name), value in changes.items():
            tried.append((qube, name))
            _put(backend, qube, name, value)
    except StoreError as error:
        left = [line for qube, name in tried for line in _put_back(backend, inventory, qube, name)]
        if not left:
            raise
        lines = "\n".join(left)
        raise StoreError(
            f"{error}.\nWhat was changed before could not be put back, and the next 'qvm-forward apply' puts "
            f"it in force:\n{lines}"
        ) from error


def _put_back(backend: Backend, inventory: Inventory, qube: QubeName, name: str) -> Iterator[str]:
    """A line for the user if this fails."""
    old = inventory.qubes[qube].features.get(feature_key(name))
    try:
        _put(backend, qube, name, old)
    except StoreError as error:
        if name == TUNNEL_NAME:
            verb = "mark" if old else "unmark"
            way_out = f"'qvm-forward tunnel {verb} {qube}' restores it"
            yield f"the mark of {qube} may be changed ({error}); {way_out}"
        elif old is None:
            yield f"{qube} {name} may be stored ({error}); 'qvm-forward remove {qube} {name}' removes it"
        else:
            yield (
                f"{qube} {name} may be changed or gone ({error}); 'qvm-forward import --replace' restores it "
                f"from this line: {qube} {ascii(name)[1:-1]} {ascii(old)[1:-1]}"
            )


def _put(backend: Backend, qube: QubeName, name: str, value: str | None) -> None:
    if value is None:
        backend.remove_feature(qube, feature_key(name))
    else:
        backend.set_feature(qube, feature_key(name), value)
