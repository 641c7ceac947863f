# SPDX-License-Identifier: GPL-2.0-or-later
"""Looks at small systems that are made by hand, with all that the rules ask for in force."""

from worlds import NOW, world

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.apply import differences
from qubes_fwd_qrexec.admin.backend import NEW, PolicyFile
from qubes_fwd_qrexec.admin.inventory import CONFIG_PREFIX, RULE_PREFIX, Inventory
from qubes_fwd_qrexec.admin.snapshot import Snapshot, read_rules
from qubes_fwd_qrexec.admin.states import Key, Plan
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.window.model.look import Look


def stored(inventory: Inventory, *rules: NamedRule | tuple[str, str, str]) -> Snapshot:
    """A system with these rules, or with what cannot be read as one: target, name and line."""
    qubes = dict(inventory.qubes)
    for each in rules:
        target, name, line = QubeName(each[0]), each[1], str(each[2])
        features = {**qubes[target].features, RULE_PREFIX + name: line}
        qubes[target] = qubes[target]._replace(features=features)
    inventory = inventory._replace(qubes=qubes)
    return Snapshot(inventory, read_rules(inventory))


def in_force(snapshot: Snapshot, plan: Plan) -> Snapshot:
    """The same system, with policy and configurations as a plan asks for."""
    qubes = dict(snapshot.inventory.qubes)
    for name, qube in qubes.items():
        kept = {key: text for key, text in qube.features.items() if not key.startswith(CONFIG_PREFIX)}
        qubes[name] = qube._replace(features=kept)
    for forward in plan:
        for name, config in forward.configs:
            features = {**qubes[name].features, f"{CONFIG_PREFIX}{config.key}": str(config)}
            qubes[name] = qubes[name]._replace(features=features)
    inventory = snapshot.inventory._replace(qubes=qubes)
    return snapshot._replace(inventory=inventory, installed=PolicyFile(policy.text(plan), NEW))


def look(
    *rules: NamedRule | tuple[str, str, str],
    inventory: Inventory | None = None,
    before: tuple[NamedRule, ...] | None = None,
    denials: dict[Key, str] | None = None,
    is_held: bool = False,
) -> Look:
    """What is seen of some rules; in force is what they ask for, or the rules ``before``."""
    inventory = inventory or world()
    snapshot = stored(inventory, *rules)
    asked = snapshot.plan(NOW, is_held=is_held)
    applied = asked if before is None else stored(inventory, *before).plan(NOW)
    snapshot = in_force(snapshot, applied)
    due = differences(asked, snapshot.inventory, snapshot.installed)
    return Look(snapshot, asked, NOW, denials or {}, tuple(due), None)


def still_allowed(*rules: NamedRule, before: tuple[NamedRule, ...], is_held: bool = False) -> Look:
    """What is seen of some rules where policy still allows the calls of those that were there ``before``,
    though no qube is told of them any more.
    """
    snapshot = stored(world(), *rules)
    asked = snapshot.plan(NOW, is_held=is_held)
    snapshot = in_force(snapshot, asked)
    allowed = PolicyFile(policy.text(stored(world(), *before).plan(NOW)), NEW)
    snapshot = snapshot._replace(installed=allowed)
    return Look(snapshot, asked, NOW, {}, differences(asked, snapshot.inventory, allowed), None)
