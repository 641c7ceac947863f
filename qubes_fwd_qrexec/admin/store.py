# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules where they are stored: feature ``forward.NAME`` of the target, whose value is the rule's line."""

from collections.abc import Iterable, Mapping
from contextlib import suppress

from qubes_fwd_qrexec.common.errors import RuleError, StoreError, TextError
from qubes_fwd_qrexec.common.rules import BrokenRule, ForwardRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName, parse_rule_name, yes_no

from .backend import Backend
from .inventory import RULE_PREFIX, TUNNEL_FEATURE, Inventory

# TUNNEL_FEATURE marks a tunnel qube, so no rule can have this name.
TUNNEL_NAME = TUNNEL_FEATURE.removeprefix(RULE_PREFIX)

Changes = Mapping[tuple[QubeName, str], str | None]
"""New lines of rules by qube and name, or None to remove one. `TUNNEL_NAME` stands for a qube's mark."""


Stored = Mapping[tuple[QubeName, str], NamedRule | BrokenRule]
"""All that is stored as rules, readable or not, in the order of target and name."""


def feature_key(name: str) -> str:
    return f"{RULE_PREFIX}{name}"


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

    On an error, and on Ctrl-C, each is put back to what it was in ``inventory``. The caller holds the lock.
    Raises `StoreError`, which lists what could not be put back.
    """
    tried: list[tuple[QubeName, str]] = []
    try:
        for (qube, name), value in changes.items():
            tried.append((qube, name))
            _put(backend, qube, name, value)
    except (StoreError, KeyboardInterrupt) as error:
        left = _changed(backend, inventory, [key for key in tried if not _put_back(backend, inventory, *key)])
        if not left:
            raise
        why = str(error) or "interrupted"
        raise StoreError(
            f"{why}.\nNot put back, and in force with the next 'qvm-forward apply':\n{''.join(left)}"
            "'qvm-forward remove' takes away what is new, 'qvm-forward import --replace' reads the rest"
        ) from error


def _put_back(backend: Backend, inventory: Inventory, qube: QubeName, name: str) -> bool:
    """Restore a feature. Returns whether that succeeded."""
    try:
        _put(backend, qube, name, inventory.qubes[qube].features.get(feature_key(name)))
    except StoreError:
        return False
    return True


def _changed(backend: Backend, inventory: Inventory, keys: list[tuple[QubeName, str]]) -> list[str]:
    """The old values of those that differ now, as lines of a document: a refused write changes nothing."""
    found = inventory._replace(qubes={})
    with suppress(StoreError):
        found = backend.inventory(with_config=False) if keys else found
    lines = []
    for qube, name in keys:
        old, now = inventory.qubes[qube].features.get(feature_key(name)), found.get(qube)
        if now is None or now.problem is not None or now.features.get(feature_key(name)) != old:
            was = yes_no(bool(old)) if name == TUNNEL_NAME else "(new)" if old is None else old
            lines.append(f"  {qube} {ascii(name)[1:-1]} {ascii(was)[1:-1]}\n")
    return lines


def _put(backend: Backend, qube: QubeName, name: str, value: str | None) -> None:
    if value is None:
        backend.remove_feature(qube, feature_key(name))
    else:
        backend.set_feature(qube, feature_key(name), value)
