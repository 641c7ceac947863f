# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker's view of a lab directory: read again when it has changed, and not at every call.

A call costs a few stat() calls here. What cannot be read denies: `LabView.judge` never allows by an older
policy.
"""

import hashlib
import os
import uuid
from pathlib import Path

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName

from .directory import QUBE_FILE, LabDirectory
from .evaluator import ADMIN_UUID, Deny, Domain, Request, System, Verdict
from .knobs import Knobs
from .policytext import PolicyTextError
from .qube import Qube
from .verdicts import Judge, LoadedPolicy

_Signature = tuple[tuple[str, int, int, int], ...]


class LabView:
    """`refresh` before each use; ``qubes``, ``system`` and ``knobs`` are of the last one."""

    def __init__(self, lab: LabDirectory, judge: Judge) -> None:
        self.lab = lab
        self.judge_name = judge.name
        self.qubes: dict[QubeName, Qube] = {}
        self.system = System({})
        self.knobs = Knobs()
        self._judge = judge
        self._policy: LoadedPolicy | PolicyTextError = PolicyTextError("the policy has not been read")
        self._signatures: dict[str, _Signature] = {}

    def refresh(self) -> None:
        """Raises `StoreError` if the qubes or knobs cannot be read; a bad policy shows in `judge`."""
        knobs = _sign([str(self.lab.file)])
        if knobs != self._signatures.get("knobs"):
            self.knobs = self.lab.knobs()
            self._signatures["knobs"] = knobs
        qubes = _sign([f"{entry}/{QUBE_FILE}" for entry in _entries(self.lab.qubes_dir)])
        if qubes != self._signatures.get("qubes"):
            self.qubes = self.lab.qubes()
            self.system = System({name: _domain(qube) for name, qube in self.qubes.items()})
            self._signatures["qubes"] = qubes
        policy = _sign(_entries(self.lab.policy_dir))
        if policy != self._signatures.get("policy"):
            try:
                self._policy = self._judge.load(self.lab.policy_dir)
            except PolicyTextError as error:
                self._policy = error
            # Signed before it is read, so that a change in between is read again and not missed.
            self._signatures["policy"] = policy

    def judge(self, request: Request) -> Verdict:
        """What the policy says of a call."""
        if isinstance(self._policy, PolicyTextError):
            return Deny(reason=f"the policy cannot be read, so that nothing is allowed: {self._policy}")
        return self._policy.judge(self.system, request)

    def find(self, target: str) -> Qube | None:
        """The qube that a verdict's target names."""
        domain = self.system.find(target)
        return None if domain is None else self.qubes.get(QubeName(domain.name))


def _domain(qube: Qube) -> Domain:
    return Domain(
        name=qube.name,
        klass=qube.klass,
        uuid=ADMIN_UUID if qube.is_admin else qube_uuid(qube.name),
        is_running=qube.is_running,
        template_for_dispvms=qube.template_for_dispvms,
        tags=frozenset(qube.tags),
    )


def qube_uuid(name: str) -> str:
    """A qube's UUID in the lab: made from its name, as the directory stores none."""
    return str(uuid.UUID(bytes=hashlib.sha256(name.encode()).digest()[:16]))


def _entries(directory: Path) -> list[str]:
    """The paths of what lies there, sorted; as text, because this is done at every call."""
    try:
        return [f"{directory}/{name}" for name in sorted(os.listdir(directory))]
    except OSError as error:
        raise StoreError(f"{directory}: {error.strerror}") from error


def _sign(paths: list[str]) -> _Signature:
    """A value that changes when one of the files is replaced, edited or removed."""
    signature = []
    for path in paths:
        try:
            status = os.stat(path)
            signature.append((path, status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError:
            signature.append((path, 0, 0, 0))
    return tuple(signature)
