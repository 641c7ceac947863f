# SPDX-License-Identifier: GPL-2.0-or-later
"""The backend over a lab's directory, which stands in for dom0 and its qubes."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import (
    ANY,
    NEW,
    WATCH_BUSY,
    Backend,
    ChangedError,
    Changes,
    PolicyCall,
    PolicyFile,
    PolicyVerdict,
)
from qubes_fwd_qrexec.admin.inventory import Inventory, Qube, feature_matters, is_configuration
from qubes_fwd_qrexec.common.errors import StoreError, why
from qubes_fwd_qrexec.common.services import NFT_SERVICE
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.system.lockfile import hold, is_held

from .directory import LOCK_TIMEOUT_S, LabDirectory, write_text

_WATCH_NAME = "watch.lock"
_WATCH_TIMEOUT_S = 1.0


def open_backend(path: str) -> Backend:
    """What `admin.views.locate` calls for ``--lab``. Raises `StoreError` if there is no lab at ``path``."""
    return LabStore(LabDirectory.open(path))


class LabStore:
    """A lab as `Backend`. Each write is atomic; `locked` is the lab's own lock."""

    def __init__(self, lab: LabDirectory, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self._lab = lab
        self._lock_timeout_s = lock_timeout_s
        self._policy_path = lab.policy_dir / f"{policy.NAME}.policy"

    def inventory(self, *, with_config: bool = True) -> Inventory:
        found = {}
        for name in self._lab.qube_names():
            features, problem = self._features(name)
            try:
                qube = self._lab.qube(name)
            except StoreError as error:
                configured = frozenset(filter(is_configuration, features))
                found[name] = Qube(name, "AppVM", features, configured=configured, problem=str(error))
                continue
            found[name] = Qube(
                name=name,
                klass=qube.klass,
                features={k: v for k, v in features.items() if feature_matters(k, with_config)},
                netvm=qube.netvm,
                is_running=qube.is_running,
                ip=qube.ip,
                ip6=qube.ip6,
                provides_network=qube.provides_network,
                template=qube.template,
                template_for_dispvms=qube.template_for_dispvms,
                tags=frozenset(qube.tags),
                configured=frozenset(filter(is_configuration, features)),
                # Of dom0 nothing is asked in Qubes either.
                label="" if qube.is_admin else qube.label,
                icon="" if qube.is_admin else qube.icon,
                problem=problem,
            )
        return Inventory(found)

    def _features(self, name: str) -> tuple[dict[str, str], str | None]:
        """The features that can be read, and the problem with one that cannot. What is not UTF-8 stays
        visible, and is nothing that any parser takes.
        """
        found: dict[str, str] = {}
        problem = None
        try:
            return self._lab.features(name), None
        except StoreError as error:
            try:
                names = os.listdir(self._lab.qube_dir(name).features)
            except OSError:
                return {}, str(error)
        for key in names:
            path = self._lab.qube_dir(name).features / key
            try:
                found[key] = path.read_text(encoding="utf-8", errors="backslashreplace")
            except OSError as error:
                problem = f"{path}: {why(error)}"
        return found, problem

    def set_feature(self, qube: QubeName, key: str, value: str) -> None:
        with _told():
            self._lab.set_feature(qube, key, value)

    def remove_feature(self, qube: QubeName, key: str) -> None:
        with _told():
            self._lab.remove_feature(qube, key)

    def read_policy(self) -> PolicyFile:
        try:
            # Without newline="" a carriage return would be read as what it is not.
            with open(self._policy_path, encoding="utf-8", newline="") as file:
                text = file.read()
        except FileNotFoundError:
            return PolicyFile(None, NEW)
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{self._policy_path}: {why(error)}") from error
        return PolicyFile(text, f"text:{text}")

    def replace_policy(self, text: str, token: str) -> None:
        if token != ANY and self.read_policy().token != token:
            raise ChangedError(self._policy_path)
        # A lab has no policy daemon that checks the text before it takes it, so check it here.
        from .policytext import PolicyTextError, parse_policy

        try:
            parse_policy(text)
        except PolicyTextError as error:
            raise StoreError(f"{self._policy_path}: not written, as it could not be read: {error}") from error
        with _told():
            write_text(self._policy_path, text)

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        import subprocess

        from qubes_fwd_qrexec.admin.answers import (
            ANSWER_TIMEOUT_S,
            AnswerError,
            NotRunningError,
            read_answer,
        )

        what = f"{service} in {qube}"
        if not _is_up(self._lab.qube_dir("dom0").agent_socket):
            up = "'qvm-forward-lab up'"
            raise NotRunningError(f"{what}: the lab is down; {up} starts it", way_out=up)
        timeout_s = (timeout_s or ANSWER_TIMEOUT_S) * self._lab.knobs().patience
        try:
            process = subprocess.Popen(
                self._call_words(qube, service),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Ctrl-C in a terminal is for us, and we end the call.
                start_new_session=True,
            )
        except OSError as error:
            raise AnswerError(f"{what}: {error.strerror}") from error
        try:
            return read_answer(process, given, max_bytes, what, timeout_s)
        except AnswerError as error:
            if service == NFT_SERVICE and (why_no_ip := self._why_no_ip()):
                raise AnswerError(
                    f"{what}: there is no forward by nft in this lab: {why_no_ip}", error.status
                ) from error
            raise

    def _why_no_ip(self) -> str:
        try:
            return self._lab.no_ip_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def verdicts(self, calls: Sequence[PolicyCall]) -> list[PolicyVerdict]:
        from dataclasses import replace

        from .evaluator import Allow, Deny, Request, System
        from .verdicts import best_judge
        from .view import LabView

        view = LabView(self._lab, best_judge())
        try:
            view.refresh()
        except StoreError as error:
            return [PolicyVerdict(None, str(error))] * len(calls)
        targets = {call.target for call in calls}
        view.system = System(
            {
                name: replace(domain, is_running=True) if name in targets else domain
                for name, domain in view.system.domains.items()
            }
        )

        def verdict(call: PolicyCall) -> PolicyVerdict:
            found = view.judge(
                Request(service=call.service, argument=call.argument, source=call.source, target=call.target)
            )
            if isinstance(found, Allow) and found.target == call.target:
                return PolicyVerdict(True, "dom0 allows the call")
            if isinstance(found, Deny):
                return PolicyVerdict(False, found.reason)
            return PolicyVerdict(False, "dom0 asks the user, or sends the call to another qube")

        return list(map(verdict, calls))

    def _call_words(self, qube: QubeName, service: str) -> list[str]:
        socket_path = self._lab.qube_dir("dom0").agent_socket
        return [str(self._lab.client_program), f"--agent-socket={socket_path}", "--", qube, service]

    @contextmanager
    def locked(self) -> Iterator[None]:
        with _told(), self._lab.locked(self._lock_timeout_s):
            yield

    def watching(self) -> AbstractContextManager[None]:
        return hold(self._lab.root / _WATCH_NAME, _WATCH_TIMEOUT_S, WATCH_BUSY)

    def unwatched(self) -> str | None:
        return None if is_held(self._lab.root / _WATCH_NAME) else "'qvm-forward watch' in another terminal"

    def read_only(self) -> str | None:
        features = (self._lab.qube_dir(name).features for name in self._lab.qube_names())
        for place in (self._lab.policy_dir, *features):
            if not os.access(place, os.W_OK, effective_ids=True):
                return f"{place}: this user cannot write there; whoever made this lab can"
        return None

    def changes(self, wakers: Sequence[int] = ()) -> AbstractContextManager[Changes]:
        from .changes import LabChanges

        return LabChanges(self._lab, feature_matters, wakers)


def _is_up(socket_path: Path) -> bool:
    """Whether a broker listens. The socket alone says nothing: a broker that was killed leaves it behind.

    Another user's broker counts, although it cannot be called.
    """
    from .clientcall import ExitError, connect

    try:
        connect(os.fsencode(socket_path)).close()
    except ExitError as error:
        return isinstance(error.__cause__, PermissionError)
    return True


@contextmanager
def _told() -> Iterator[None]:
    """Turn what the operating system refuses into a `StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{error.filename or 'lab'}: {error.strerror or error}") from error
