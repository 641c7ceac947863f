# SPDX-License-Identifier: GPL-2.0-or-later
"""A Qubes system as `Backend`, in dom0 or in a management qube.

The packages qubesadmin and qrexec take longer to import than everything else here takes to run, so they
are imported when the system is asked something.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from threading import Semaphore
from typing import Any

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.answers import (
    CALLS_AT_ONCE,
    AnswerError,
    NotRunningError,
    read_answer,
    waiting,
)
from qubes_fwd_qrexec.admin.backend import WATCH_BUSY, Changes, PolicyCall, PolicyFile, PolicyVerdict
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.services import CUT_SERVICE, NFT_SERVICE
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.system.lockfile import hold, is_held, why_not

from . import policyapi
from .errors import WHO_MAY, asking_qubesd, how_to_allow
from .reading import read_inventory

# Root and the group qubes can write there, in dom0 (qubes-core-admin linux/system-config/tmpfiles-qubes.conf)
# and in a qube (qubes-core-agent-linux vm-systemd/qubes-sysinit.sh); it is gone at boot, as a lock should be.
_LOCK_FILE = "run/qubes/qvm-forward.lock"
_WATCH_FILE = "run/qubes/qvm-forward-watch.lock"
# docs/facts.md, P2: where it is there, our own file means nothing, and the policy API does not say so.
_SHADOW = f"run/qubes/policy.d/{policy.NAME}.policy"
# Where a qube's qrexec daemon listens, in dom0 alone (qubes-core-qrexec daemon/qrexec-daemon.c).
_DAEMONS = "run/qubes"
_QREXEC_CLIENT = "usr/bin/qrexec-client"
LOCK_TIMEOUT_S = 10.0
"""How long a change waits for another one."""
_WATCH_TIMEOUT_S = 1.0


def _user(service: str) -> str:
    """Who runs a service of ours in a qube: its firewall needs root, and nobody else may cut connections."""
    return "root" if service.partition("+")[0] in (CUT_SERVICE, NFT_SERVICE) else "user"


class QubesStore:
    """Each call has an app of its own: what one remembers is not renewed, nor meant for several threads."""

    def __init__(self, root: str | Path = "/", *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self._lock_timeout_s = lock_timeout_s
        self._lock_file = Path(root, _LOCK_FILE)
        self._watch_file = Path(root, _WATCH_FILE)
        self._shadow = Path(root, _SHADOW)
        self._daemons = Path(root, _DAEMONS)
        self._qrexec_client = Path(root, _QREXEC_CLIENT)
        self._room = Semaphore(CALLS_AT_ONCE)

    def _open_app(self) -> Any:
        import qubesadmin

        return qubesadmin.Qubes()

    @cached_property
    def _here(self) -> QubeName | None:
        """The management qube that this runs in; None in dom0."""
        app = self._open_app()
        return None if app.qubesd_connection_type == "socket" else QubeName(app.local_name)

    def inventory(self, *, with_config: bool = True) -> Inventory:
        return read_inventory(self._open_app, self._here, with_config)

    def set_feature(self, qube: QubeName, key: str, value: str) -> None:
        with asking_qubesd(f"admin.vm.feature.Set+{key}", qube, self._here):
            self._open_app().domains.get_blind(qube).features[key] = value

    def remove_feature(self, qube: QubeName, key: str) -> None:
        from qubesadmin.exc import QubesFeatureNotFoundError

        asking = asking_qubesd(f"admin.vm.feature.Remove+{key}", qube, self._here)
        with asking, suppress(QubesFeatureNotFoundError):
            del self._open_app().domains.get_blind(qube).features[key]

    def read_policy(self) -> PolicyFile:
        if self._here is None and self._shadow.exists():
            raise StoreError(f"{self._shadow} overrides the file that qvm-forward writes; remove it")
        return policyapi.read(self._here)

    def replace_policy(self, text: str, token: str) -> None:
        policyapi.replace(text, token, self._here)

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        try:
            with waiting():
                self._room.acquire()
            try:
                process = self._open_call(qube, service)
                return read_answer(process, given, max_bytes, f"{service} in {qube}", timeout_s)
            finally:
                self._room.release()
        except AnswerError as error:
            if error.status != ExitStatus.REFUSED or self._here is None:
                raise
            if qube == self._here:
                text = f"{error}; no qube can call itself"
                raise AnswerError(text, error.status, way_out="run it in dom0") from error
            name, user = service.partition("+")[0], _user(service)
            line = f"{name}  *  {self._here}  @anyvm  allow  user={user}  autostart=no  notify=no"
            way_out = "add that line to dom0's policy"
            raise AnswerError(f"{error}. {how_to_allow(line)}", error.status, way_out=way_out) from error
        except StoreError as error:
            raise AnswerError(str(error)) from error

    def _open_call(self, qube: QubeName, service: str) -> Any:
        """A process that is the call. Raises `NotRunningError`, which is certain, and `StoreError`."""
        # Ctrl-C in a terminal is for us, and we end the call.
        popen: dict[str, Any] = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "start_new_session": True}
        if self._here is None and (self._daemons / f"qrexec.{qube}").exists():
            # qubesadmin would do the same, but asks qubesd first, and calls are to end though qubesd hangs.
            command = f"{_user(service)}:QUBESRPC {service} dom0"
            with asking_qubesd(service, qube, self._here):
                return Popen([self._qrexec_client, "-d", qube, command], **popen)
        app = self._open_app()
        # From a management qube qubesd is as far away as any qube; in dom0 it answers at once.
        asked = nullcontext() if self._here is None else waiting()
        # A management qube cannot choose; there the policy's user= does.
        user = _user(service) if self._here is None else None
        try:
            with asking_qubesd(service, qube, self._here), asked:
                return app.run_service(qube, service, user=user, autostart=False, **popen)
        except NotRunningError:
            self._check_state(app, qube)
            raise

    def _check_state(self, app: Any, qube: QubeName) -> None:
        """Raise `StoreError` unless it is halted or gone; qubesadmin may err (docs/facts.md, A13)."""
        from qubesadmin.exc import QubesVMNotFoundError

        method = "admin.vm.CurrentState"
        with asking_qubesd(method, qube, self._here), suppress(QubesVMNotFoundError):
            if b"power_state=Halted" not in app.qubesd_call(qube, method):
                raise StoreError(
                    f"{method} at {qube}: it was halted a moment ago and is running now; try again"
                )

    def verdicts(self, calls: Sequence[PolicyCall]) -> list[PolicyVerdict]:
        if self._here is not None:
            reason = f"{self._here} is not dom0, and only dom0 can read its whole policy"
            return [PolicyVerdict(None, reason)] * len(calls)
        return policyapi.verdicts(calls)

    def watching(self) -> AbstractContextManager[None]:
        return hold(self._watch_file, _WATCH_TIMEOUT_S, WATCH_BUSY)

    def unwatched(self) -> str | None:
        if is_held(self._watch_file):
            return None
        start = "'systemctl enable --now qubes-forward-watch'"
        return start if self._here is None else f"{start} in {self._here}, unless it runs in dom0"

    def read_only(self) -> str | None:
        # What policy lets a management qube change shows when it does.
        problem = why_not(self._lock_file)
        return None if problem is None else f"{problem}; {WHO_MAY}"

    def changes(self, wakers: Sequence[int] = ()) -> AbstractContextManager[Changes]:
        from qubesadmin.events import EventsDispatcher

        from .events import POLICY_DIR, PROCESS_ENDS_S, RUN_POLICY_DIR, QubesChanges

        dispatcher = EventsDispatcher(self._open_app(), enable_cache=False)
        linger_s = 0.0 if self._here is None else PROCESS_ENDS_S
        return QubesChanges(dispatcher, (POLICY_DIR, RUN_POLICY_DIR), wakers, linger_s)

    def locked(self) -> AbstractContextManager[None]:
        wait_s = self._lock_timeout_s
        busy = f"another qvm-forward is changing this system, and did not finish within {wait_s:g} s"
        return hold(self._lock_file, wait_s, f"{busy}; see what it waits for", f"; {WHO_MAY}")
