# SPDX-License-Identifier: GPL-2.0-or-later
"""A backend for `panic`, which logs what is done and refuses what it is told to; and what is to be done."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from worlds import Result

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import PolicyCall, PolicyFile, PolicyVerdict
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.services import REVOKE_SERVICE
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LOCK_TIMEOUT_S, LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore


class Faulty:
    """A lab whose backend logs what is done, and refuses what it is told to refuse."""

    def __init__(
        self,
        lab: LabDirectory,
        *refused: str,
        before: Callable[[str], None] | None = None,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> None:
        self._store = LabStore(lab, lock_timeout_s=lock_timeout_s)
        self._refused = refused
        self._before = before
        self.log: list[str] = []
        self.given: dict[str, str] = {}
        """What each target was told last."""

    def _do(self, entry: str) -> None:
        if self._before is not None:
            self._before(entry)
        self.log.append(entry)
        if any(entry.startswith(word) for word in self._refused):
            raise StoreError(f"cannot {entry}")

    def inventory(self, *, with_config: bool = True) -> Inventory:
        self._do("inventory")
        return self._store.inventory(with_config=with_config)

    def set_feature(self, qube: QubeName, key: str, value: str) -> None:
        self._do(f"set {qube} {key}")
        self._store.set_feature(qube, key, value)

    def remove_feature(self, qube: QubeName, key: str) -> None:
        self._do(f"remove {qube} {key}")
        self._store.remove_feature(qube, key)

    def read_policy(self) -> PolicyFile:
        self._do("read")
        return self._store.read_policy()

    def replace_policy(self, text: str, token: str) -> None:
        held = " held" if policy.is_held(text) else ""
        self._do(f"policy {len(policy.allowing(text))}{held}")
        self._store.replace_policy(text, token)

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        if service != REVOKE_SERVICE:
            return self._store.ask(qube, service, max_bytes, timeout_s, given)
        self._do(f"call {qube}")
        self.given[qube] = given
        return b"version=1 ended=1 draining=0\n"

    def verdicts(self, calls: Sequence[PolicyCall]) -> list[PolicyVerdict]:
        self._do("judge")
        return self._store.verdicts(calls)

    def unwatched(self) -> str | None:
        return self._store.unwatched()

    def read_only(self) -> str | None:
        return self._store.read_only()

    def locked(self) -> AbstractContextManager[None]:
        self._do("lock")
        return self._store.locked()


Panic = Callable[..., Result]


def allowed(lab: LabDirectory) -> frozenset[str]:
    return policy.allowing((lab.policy_dir / "30-forward.policy").read_text())


def is_held(lab: LabDirectory) -> bool:
    return policy.is_held((lab.policy_dir / "30-forward.policy").read_text())
