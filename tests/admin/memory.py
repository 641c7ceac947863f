# SPDX-License-Identifier: GPL-2.0-or-later
"""A backend in memory, whose every change is logged and can be refused."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from worlds import NOW

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.admin.apply import Outcome, Step, differences, reconcile
from qubes_fwd_qrexec.admin.backend import ANY, NEW, Backend, ChangedError, PolicyFile
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.nftreport import NftReport
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.common.services import NFT_SERVICE
from qubes_fwd_qrexec.common.values import QubeName

NO_FORWARDS = NftReport(program="0.1", versions=frozenset((4, 6)))


class Memory:
    """A backend in memory that logs each change, and refuses the changes that it is told to."""

    def __init__(self, inventory: Inventory) -> None:
        self.qubes = {name: dict(qube.features) for name, qube in inventory.qubes.items()}
        self._inventory = inventory
        self.policy: str | None = None
        self.log: list[str] = []
        self.given: dict[str, str] = {}
        """What each target was told last."""
        self.answer = b"version=1 ended=1 draining=0\n"
        self.reports: dict[str, NftReport | AnswerError] = {}
        """What each qube says of its firewall; that it has nothing, unless it is named here."""
        self.refuses: Callable[[str], bool] = lambda entry: False

    def _do(self, entry: str) -> None:
        if self.refuses(entry):
            raise StoreError(f"cannot {entry}")
        self.log.append(entry)

    def inventory(self, *, with_config: bool = True) -> Inventory:
        old = self._inventory.qubes
        return Inventory({n: old[n]._replace(features=dict(f)) for n, f in self.qubes.items()})

    def set_feature(self, qube: QubeName, key: str, value: str) -> None:
        self._do(f"set {qube} {key}")
        self.qubes[qube][key] = value

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        self._do(f"call {qube} {service}")
        if service == NFT_SERVICE:
            report = self.reports.get(qube, NO_FORWARDS)
            if isinstance(report, AnswerError):
                raise report
            return json.dumps(report.as_json()).encode()
        self.given[qube] = given
        return self.answer

    def remove_feature(self, qube: QubeName, key: str) -> None:
        self._do(f"remove {qube} {key}")
        self.qubes[qube].pop(key, None)

    def read_policy(self) -> PolicyFile:
        return PolicyFile(self.policy, NEW if self.policy is None else self.policy)

    def replace_policy(self, text: str, token: str) -> None:
        if token not in (ANY, self.read_policy().token):
            raise ChangedError("policy")
        held = " held" if policy.is_held(text) else ""
        self._do(f"policy {len(policy.allowing(text))}{held}")
        self.policy = text

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield


def steps(backend: Backend, *rules: NamedRule) -> tuple[Step, ...]:
    inventory = backend.inventory()
    return differences(plan(rules, inventory, NOW), inventory, backend.read_policy())


def applied(backend: Memory, *rules: NamedRule) -> Outcome:
    """What becomes of a system with exactly these rules when it is reconciled."""
    for qube, features in backend.qubes.items():
        mine = {f"forward.{named.name}": str(named.rule) for named in rules if named.target == qube}
        kept = {key: value for key, value in features.items() if not key.startswith("forward.")}
        backend.qubes[qube] = kept | mine
    backend.log.clear()
    return reconcile(backend, NOW).outcome
