# SPDX-License-Identifier: GPL-2.0-or-later
"""The backend over a Qubes system, in dom0 or in a management qube.

It has the packages qubesadmin and qrexec, which take longer to import than everything else here takes to
run: they are imported when something is asked of the system, and not before.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from threading import Lock

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName

from . import policy
from .adminapi import AdminApi
from .backend import Changes, PolicyCall, PolicyFile, PolicyVerdict, check_feature
from .inventory import Inventory
from .policyapi import PolicyApi

# Root and the group qubes can write there, in dom0 (qubes-core-admin linux/system-config/tmpfiles-qubes.conf)
# and in a qube (qubes-core-agent-linux vm-systemd/qubes-sysinit.sh); it is gone at boot, as a lock should be.
# /run/qubes-forward is the directory of a target's tunnels, and a management qube may be a target too.
LOCK_PATH = "/run/qubes/qvm-forward.lock"
WATCH_PATH = "/run/qubes/qvm-forward-watch.lock"
_LOCK_TIMEOUT_S = 10.0
_LOCK_RETRY_S = 0.02
# qubes-core-qrexec libqrexec/qrexec.h: QREXEC_EXIT_REQUEST_REFUSED.
_REFUSED = 126
# A management qube's call to qubesd is a qrexec call, of which most is waiting.
_REMOTE_CALLS = 8


class QubesStore:
    """A Qubes system as `Backend`."""

    def __init__(self) -> None:
        # qubesadmin's run_service() looks the qube up in the app, whose cache is not made for threads, and
        # starts a process; it waits for qubesd, and never for the qube that is called.
        self._starting = Lock()

    @cached_property
    def _admin(self) -> AdminApi:
        import qubesadmin

        return AdminApi(qubesadmin.Qubes())

    @cached_property
    def _policy(self) -> PolicyApi:
        from qrexec.policy.admin_client import PolicyClient

        return PolicyApi(PolicyClient(), None if self._admin.is_local else self._admin.here)

    def inventory(self, *, with_config: bool = True) -> Inventory:
        listed = self._admin.qubes()
        read = partial(self._admin.qube, with_config=with_config)
        if self._admin.is_local:
            found = list(map(read, listed))
            here = None
        else:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(_REMOTE_CALLS) as pool:
                found = list(pool.map(read, listed))
            here = QubeName(self._admin.here)
        return Inventory({qube.name: qube for qube in found if qube is not None}, here)

    def set_feature(self, qube: QubeName, key: str, value: str) -> None:
        check_feature(qube, key, value)
        self._admin.set_feature(qube, key, value)

    def remove_feature(self, qube: QubeName, key: str) -> None:
        self._admin.remove_feature(qube, key)

    def read_policy(self) -> PolicyFile:
        return self._policy.read()

    def replace_policy(self, text: str, token: str) -> None:
        self._policy.replace(text, token)

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        from .answers import ANSWER_TIMEOUT_S, AnswerError, read_answer

        bound_s = ANSWER_TIMEOUT_S if timeout_s is None else timeout_s
        try:
            with self._starting:
                process = self._admin.start_service(qube, service, has_input=bool(given))
            return read_answer(process, max_bytes, f"{service} in {qube}", bound_s, given)
        except AnswerError as error:
            if error.status == _REFUSED and not self._admin.is_local and qube == self._admin.here:
                raise AnswerError(
                    f"{error}; no qube can call itself", error.status, way_out="say it in dom0"
                ) from error
            if not (way_out := self._way_out(qube, service, error.status or 0)):
                raise
            raise AnswerError(
                f"{error}{way_out}", error.status, way_out="have that line in dom0's policy"
            ) from error
        except StoreError as error:
            raise AnswerError(str(error)) from error

    def verdicts(self, calls: Sequence[PolicyCall]) -> list[PolicyVerdict]:
        if not self._admin.is_local:
            reason = f"{self._admin.here} is not dom0, whose whole policy only dom0 can read"
            return [PolicyVerdict(None, reason)] * len(calls)
        from .qubesverdict import verdicts

        return verdicts(calls)

    def _way_out(self, qube: QubeName, service: str, status: int) -> str:
        if status != _REFUSED or self._admin.is_local:
            return ""
        name = service.partition("+")[0]
        return (
            "; dom0's policy denies it to every qube, unless a file that sorts before 30-forward.policy has "
            f"the line '{name}  *  {self._admin.here}  @anyvm  allow  user=user  autostart=no  notify=no'"
        )

    def watching(self) -> AbstractContextManager[None]:
        from .watched import watching

        return watching(Path(WATCH_PATH))

    def unwatched(self) -> str | None:
        from .watched import is_watched

        if is_watched(Path(WATCH_PATH)):
            return None
        start = "'systemctl enable --now qubes-forward-watch'"
        return start if self._admin.is_local else f"unless dom0's does, {start} there"

    def changes(self, wakers: Sequence[int] = ()) -> AbstractContextManager[Changes]:
        from .qubesevents import qubes_changes

        return qubes_changes(policy.NAME, wakers)

    @contextmanager
    def locked(self, timeout_s: float | None = None) -> Iterator[None]:
        timeout_s = _LOCK_TIMEOUT_S if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        fd = self._open_lock()
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise StoreError(
                            f"{LOCK_PATH}: another qvm-forward is changing this system, and was not "
                            f"done within {timeout_s:g} s; see what it waits for"
                        ) from None
                    time.sleep(_LOCK_RETRY_S)
            yield
        finally:
            os.close(fd)

    def _open_lock(self) -> int:
        try:
            fd = os.open(LOCK_PATH, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
        except OSError as error:
            raise StoreError(
                f"{LOCK_PATH}: {error.strerror}; qvm-forward works as root or as a member of the group qubes"
            ) from error
        with suppress(PermissionError):
            # Whatever root's umask is: the group is to open it too.
            os.fchmod(fd, 0o660)
        return fd
