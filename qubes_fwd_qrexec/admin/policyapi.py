# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's policy file through Qubes' policy API, which reads the whole policy before it takes a new file.

`qrexec.policy.admin_client` says from 4.3.x (April 2026) on what was wrong; before, a call that failed is
a `CalledProcessError` whatever the cause, and the cause is on standard error. So causes are told apart by
asking again, not by what an error says.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import CalledProcessError
from typing import Protocol

from qubes_fwd_qrexec.common.errors import StoreError

from . import policy
from .backend import ANY, NEW, ChangedError, PolicyFile

_PLACE = f"dom0's /etc/qubes/policy.d/{policy.NAME}.policy"
# qubes-core-qrexec libqrexec/qrexec.h: QREXEC_EXIT_REQUEST_REFUSED.
_REFUSED = 126
# qrexec/tools/qubes_policy_admin.py: understood, and not done for a reason; 2 is an error within.
_BAD_REQUEST = 1


# In dom0 whoever calls opens it, qrexec/tools/qubes_policy_admin.py: whoever may not gets a traceback.
_LOG = "/var/log/qubes/policy-admin.log"


class Client(Protocol):
    """What of `qrexec.policy.admin_client.PolicyClient` is used."""

    def policy_list(self) -> list[str]: ...

    def policy_get(self, name: str) -> tuple[str, str]: ...

    def policy_replace(self, name: str, content: str, token: str) -> None: ...


class PolicyApi:
    """One file of dom0's policy. ``here`` is the management qube that this runs in, None in dom0."""

    def __init__(self, client: Client, here: str | None) -> None:
        self._client = client
        self._here = here

    def read(self) -> PolicyFile:
        from qrexec.policy.admin_client import PolicyAdminException

        with self._told("policy.Get"):
            try:
                return PolicyFile(*self._client.policy_get(policy.NAME))
            except (PolicyAdminException, CalledProcessError):
                if self._exists():
                    raise
        return PolicyFile(None, NEW)

    def replace(self, text: str, token: str) -> None:
        """Raises `StoreError`; the file is then as it was."""
        from qrexec.policy.admin_client import PolicyAdminException

        with self._told("policy.Replace"):
            try:
                self._client.policy_replace(policy.NAME, text, token)
                return
            except CalledProcessError as error:
                if error.returncode != _BAD_REQUEST:
                    raise
                why = _said(error.stderr)
            except PolicyAdminException as error:
                why = f": {error}"
        if token != ANY and self.read().token != token:
            raise ChangedError(_PLACE)
        raise StoreError(
            f"{_PLACE}: not written, as dom0's policy could not be read with it{why}. Where that names "
            "another file, mend that one: until then dom0 may be refusing every call"
        )

    def _exists(self) -> bool:
        with self._told("policy.List"):
            return policy.NAME in self._client.policy_list()

    @contextmanager
    def _told(self, method: str) -> Iterator[None]:
        """Turn what the client raises into a `StoreError`."""
        from qrexec.policy.admin_client import PolicyAdminException

        if self._here is None and os.path.exists(_LOG) and not os.access(_LOG, os.W_OK):
            raise StoreError(
                f"{_LOG}: it is not for you to write, and the policy API needs that; as root, "
                f"'chgrp qubes {_LOG}; chmod g+w {_LOG}' mends it"
            )
        # Root may be the first to write the log; the group is to write it too.
        umask = os.umask(0o002)
        try:
            yield
        except CalledProcessError as error:
            raise StoreError(
                f"{_PLACE}: {method} ended with exit status {error.returncode}{_said(error.stderr)}. "
                f"{self._way_out(method, error.returncode)}"
            ) from error
        except (PolicyAdminException, UnicodeDecodeError, OSError) as error:
            raise StoreError(f"{_PLACE}: {method}: {error}") from error
        except NotImplementedError as error:
            raise StoreError(
                f"{_PLACE}: {method}: {error}; qrexec-client or qrexec-client-vm is missing"
            ) from error
        finally:
            os.umask(umask)

    def _way_out(self, method: str, status: int) -> str:
        if status != _REFUSED or self._here is None:
            return (
                "'/var/log/qubes/policy-admin.log' in dom0 may say why; qvm-forward works as root or as a "
                "member of the group qubes"
            )
        argument = "*" if method == "policy.List" else f"+{policy.NAME}"
        return (
            "If dom0's policy is what refuses it, this line allows it, in a file of /etc/qubes/policy.d that "
            "sorts before 90-admin-policy-default.policy: "
            f"'{method}  {argument}  {self._here}  @adminvm  allow  target=dom0'. "
            "qvm-forward(1) has all that a management qube needs"
        )


def _said(stderr: bytes | None) -> str:
    """What a failed call wrote, on one line and without what a terminal could take for more than text."""
    if stderr is None:
        return " (the message before this one says more)"
    lines = stderr.decode("ascii", "backslashreplace").strip().splitlines()
    # Of a traceback only what went wrong.
    words = " ".join(lines[-1:] if any(line.startswith("Traceback") for line in lines) else lines)
    words = " ".join(words.split())
    said = "".join(c if " " <= c <= "~" else "?" for c in words)
    return f": {said}" if said else ""
