# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's policy: our own file through Qubes' policy API, and what its own parser says of all of it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from subprocess import CalledProcessError
from threading import Lock
from typing import Any

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import ANY, NEW, ChangedError, PolicyCall, PolicyFile, PolicyVerdict
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus

from .errors import WHO_MAY, how_to_allow, plain

_FILE = f"dom0's /etc/qubes/policy.d/{policy.NAME}.policy"
# qrexec/tools/qubes_policy_admin.py: the request was understood and not carried out; 2 is an error within.
_BAD_REQUEST = 1


class _NotDoneError(StoreError):
    """The policy API has understood a call and did not carry it out."""


def read(here: str | None) -> PolicyFile:
    """Our policy file; ``here`` is as in `errors`. Raises `StoreError`."""
    try:
        with _client("policy.Get", here) as client:
            return PolicyFile(*client.policy_get(policy.NAME))
    except _NotDoneError:
        # An old client does not say whether that is because there is none.
        with _client("policy.List", here) as client:
            if policy.NAME in client.policy_list():
                raise
    return PolicyFile(None, NEW)


def replace(text: str, token: str, here: str | None) -> None:
    """Raises `ChangedError` and `StoreError`; the file is then as it was."""
    try:
        with _client("policy.Replace", here) as client:
            client.policy_replace(policy.NAME, text, token)
    except _NotDoneError as error:
        if token != ANY and read(here).token != token:
            raise ChangedError(_FILE) from error
        raise StoreError(
            f"{error}: not written, as dom0's policy could not be read with it. If the error is in "
            "another file, fix that one: until then dom0 may refuse every call"
        ) from error


class _SharedUmask:
    """The group may write what is made as long as any thread is within. A umask is that of all of them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._within = 0
        self._before = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._before = os.umask(0o002)
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                os.umask(self._before)


# In dom0 the caller writes the API's log: if root is the first, the group must be able to write it too.
_SHARED_UMASK = _SharedUmask()


@contextmanager
def _client(method: str, here: str | None) -> Iterator[Any]:
    """A `PolicyClient` for one call. Raises `_NotDoneError` and `StoreError`.

    Since April 2026, in Qubes 4.4, the client has exceptions for what was wrong; before, it has the call's
    exit status and what that printed (docs/facts.md, P10).
    """
    from qrexec.policy import admin_client

    refused = getattr(admin_client, "PolicyAdminException", ())
    try:
        with _SHARED_UMASK:
            yield admin_client.PolicyClient()
    except refused as error:
        raise _NotDoneError(f"{_FILE}: {method}: {plain(error)}") from error
    except CalledProcessError as error:
        printed = (error.stderr or error.output or b"").decode("utf-8", "backslashreplace")
        # Of a traceback the last line says what was wrong.
        said = printed.strip().rpartition("\n")[2]
        why = f": {plain(said)}" if said else ""
        what = f"{_FILE}: {method} ended with exit status {error.returncode}{why}"
        if error.returncode == _BAD_REQUEST:
            raise _NotDoneError(what) from error
        way_out = f"'/var/log/qubes/policy-admin.log' in dom0 may say why; {WHO_MAY}"
        if here and error.returncode == ExitStatus.REFUSED:
            argument = "*" if method == "policy.List" else f"+{policy.NAME}"
            way_out = how_to_allow(f"{method}  {argument}  {here}  @adminvm  allow  target=dom0")
        raise StoreError(f"{what}. {way_out}") from error
    except (NotImplementedError, OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{_FILE}: {method}: {plain(error)}") from error


def verdicts(calls: Sequence[PolicyCall]) -> list[PolicyVerdict]:
    """What dom0 would say of calls if their targets ran; the policy is read once.

    They come from qrexec/policy/parser.py, which judges real calls by the same files. Where it fails, dom0
    refuses the call.
    """
    import logging

    from qrexec.exc import AccessDenied
    from qrexec.policy.parser import AllowResolution, FilePolicy, Request
    from qrexec.utils import get_system_info

    def verdict(call: PolicyCall) -> PolicyVerdict:
        try:
            names = call.target, f"uuid:{system['domains'][call.target].get('uuid')}"
            found = rules.evaluate(Request(*call, system_info=system))
        except AccessDenied as error:
            return PolicyVerdict(False, str(error) or "dom0 denies the call")
        # Asserts and lookups, where the call or a line names a qube that does not exist.
        except (AssertionError, AttributeError, LookupError, OSError, ValueError) as error:
            return PolicyVerdict(False, f"the policy cannot be evaluated: {type(error).__name__}: {error}")
        if isinstance(found, AllowResolution) and str(found.target) in names:
            return PolicyVerdict(True, "dom0 allows the call")
        return PolicyVerdict(False, "dom0 asks the user first, or redirects the call")

    if not (root := logging.getLogger()).handlers:
        # The parser warns of what will be deprecated, in a file that each system has. That is for others to
        # tell, and without any handler it would be on our stderr.
        root.addHandler(logging.NullHandler())
    try:
        system: dict[str, Any] = get_system_info()
        rules: Any = FilePolicy()
    except (AccessDenied, OSError, ValueError) as error:
        reason = f"the policy cannot be read, so dom0 denies every call: {error}"
        return [PolicyVerdict(False, reason)] * len(calls)
    for domain in system["domains"].values():
        domain["power_state"] = "Running"
    return list(map(verdict, calls))
