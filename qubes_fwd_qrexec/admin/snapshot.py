# SPDX-License-Identifier: GPL-2.0-or-later
"""The system as it was read, once: its qubes, the rules stored there, and dom0's policy file."""

from collections.abc import Collection
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import RefusedError, StoreError
from qubes_fwd_qrexec.common.rules import BrokenRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName

from . import policy
from .backend import ANY, NEW, Backend, PolicyFile
from .inventory import Inventory
from .plan import plan
from .states import Plan
from .store import Changes, Stored, feature_key, names_at, read_rules

# A policy file that cannot be read is replaced only by one that allows nothing.
_UNREAD = PolicyFile(None, ANY)


class Snapshot(NamedTuple):
    """What the system was when it was read.

    ``installed`` is dom0's policy file; ``policy_problem`` says why that could not be read, if it could not.
    """

    inventory: Inventory
    stored: Stored
    installed: PolicyFile = PolicyFile(None, NEW)
    policy_problem: str | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be read."""
        found = (self.policy_problem, *(qube.problem for qube in self.inventory.qubes.values()))
        return tuple(text for text in found if text is not None)

    @property
    def is_held(self) -> bool:
        """Whether dom0's policy says that everything is held."""
        return policy.is_held(self.installed.text)

    def plan(
        self,
        now: float,
        newcomers: Collection[tuple[QubeName, RuleName]] = (),
        *,
        is_held: bool | None = None,
    ) -> Plan:
        """What the rules ask for. ``is_held`` overrides what dom0's policy says of the hold."""
        planned = plan(
            (entry for entry in self.stored.values() if isinstance(entry, NamedRule)),
            self.inventory,
            now,
            broken=(entry for entry in self.stored.values() if isinstance(entry, BrokenRule)),
            newcomers=newcomers,
            stock=policy.stock_targets(self.installed.text),
        )
        if not (self.is_held if is_held is None else is_held):
            return planned
        return planned.held()

    def changed(self, changes: Changes) -> "Snapshot":
        """The system as it would be with some rules and marks changed; their qubes must exist."""
        qubes = dict(self.inventory.qubes)
        for (qube, name), value in changes.items():
            features = {key: text for key, text in qubes[qube].features.items() if key != feature_key(name)}
            if value is not None:
                features[feature_key(name)] = value
            qubes[qube] = qubes[qube]._replace(features=features)
        inventory = Inventory(qubes)
        return self._replace(inventory=inventory, stored=read_rules(inventory))

    def check_qube(self, name: str) -> QubeName:
        """The qube of that name. Raises `RefusedError` if there is none."""
        qube = self.inventory.get(name)
        if qube is None:
            raise RefusedError(f"there is no qube {name!a}; 'qvm-ls' lists all qubes")
        return qube.name

    def find(self, target: str, name: str) -> NamedRule | BrokenRule:
        """A stored rule. Raises `RefusedError`, which lists the forwards that the qube does have."""
        entry = self.stored.get((self.check_qube(target), name))
        if entry is None:
            names = ", ".join(ascii(known)[1:-1] for known in names_at(self.stored, target))
            if not names:
                raise RefusedError(f"{target} has no forwards; 'qvm-forward list' shows those of all qubes")
            raise RefusedError(f"{target} has no forward {name!a}, only {names}")
        return entry


def look(backend: Backend, *, with_config: bool = False) -> Snapshot:
    """Read the system. Raises `StoreError`.

    ``with_config``: also what the listeners have been told, which only a comparison needs.
    """
    # Policy first: its token then shows that somebody closed it while the qubes were being read.
    installed, problem = _UNREAD, None
    try:
        installed = backend.read_policy()
    except StoreError as error:
        problem = str(error)
    inventory = backend.inventory(with_config=with_config)
    return Snapshot(inventory, read_rules(inventory), installed, problem)
