# SPDX-License-Identifier: GPL-2.0-or-later
"""What `admin` asks of the system that it runs on: the one interface of the lab and of Qubes.

Inventory is read as a whole; changes are made one by one. An implementation raises `StoreError` for
whatever goes wrong, and says in it what and where.
"""

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from qubes_fwd_qrexec.values import QubeName

from .inventory import Inventory

# The token of a policy file that does not exist yet, as in qrexec.policy.admin_client.
NEW = "new"
# The token that stands for whatever the file says now: for closing everything, and for nothing else.
ANY = "any"


class PolicyFile(NamedTuple):
    """The policy file as it was read; ``token`` stands for exactly this text, which is None if missing."""

    text: str | None
    token: str


class Backend(Protocol):
    """A system of qubes. Nothing here locks by itself: whoever changes things holds `locked`."""

    def inventory(self) -> Inventory:
        """All qubes as they are now, with all of their features."""

    def set_feature(self, qube: QubeName, key: str, value: str) -> None:
        """Set one feature; ``vm-config.`` ones reach a running qube at once, others at its start."""

    def remove_feature(self, qube: QubeName, key: str) -> None:
        """Remove one feature, and what the qube sees of it; it need not exist."""

    def read_policy(self) -> PolicyFile:
        """The policy file that qvm-forward writes."""

    def replace_policy(self, text: str, token: str) -> None:
        """Replace the policy file as a whole; refuse if it is not what ``token`` stood for any more,
        or if dom0's policy could not be read with it. The token `ANY` is for every file, read or not.
        """

    def call(self, qube: QubeName, service: str) -> None:
        """Make a qrexec call from dom0 (``NAME+ARGUMENT``), without input, and wait for its end.

        Raises `StoreError` unless it ended with status 0. A qube without the service has done no harm:
        what is to be ended by the call cannot be there either.
        """

    def locked(self) -> AbstractContextManager[None]:
        """Exclude all others that change rules, configuration or policy through a backend."""
