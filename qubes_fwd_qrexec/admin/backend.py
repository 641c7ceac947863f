# SPDX-License-Identifier: GPL-2.0-or-later
"""What `admin` needs from the system that it runs on: the one interface to Qubes and to the lab.

Every failure is a `StoreError`, which says what failed and where.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName

from .inventory import Inventory

# The token of a policy file that does not exist yet, as in qrexec.policy.admin_client.
NEW = "new"
# The token that stands for whatever the file says now: for closing everything, and for nothing else.
ANY = "any"
# For whoever starts a second one.
WATCH_BUSY = "another 'qvm-forward watch' is already running"


class ChangedError(StoreError):
    """Somebody else has changed the policy file since it was read; it is left as they wrote it."""

    def __init__(self, place: object) -> None:
        super().__init__(f"{place}: somebody else has just changed it; try again")


class PolicyFile(NamedTuple):
    """The policy file as it was read; ``token`` stands for exactly this text, which is None if missing.

    One that could not be read has the token `ANY`, and ``problem`` says why. Only a file that allows nothing
    takes its place.
    """

    text: str | None
    token: str
    problem: str | None = None

    @property
    def is_read(self) -> bool:
        """Whether it could be read at all."""
        return self.token != ANY


class PolicyCall(NamedTuple):
    """A qrexec call as policy judges it; ``argument`` begins with ``+``."""

    service: str
    argument: str
    source: QubeName
    target: QubeName


class PolicyVerdict(NamedTuple):
    """``is_allowed`` is None where dom0's policy cannot be read from here; ``reason`` says more."""

    is_allowed: bool | None
    reason: str


class Changes(Protocol):
    """Reports that something has changed that plan, configuration or policy depend on, but not what."""

    def wait(self, timeout_s: float | None) -> bool:
        """Block until something changed (True), ``timeout_s`` are over or a waker is readable (False).

        The first call connects, and returns True then. Raises `StoreError` if that fails or the connection is
        lost: begin anew.
        """


class Backend(Protocol):
    """A system of qubes. Whoever changes something holds `locked`."""

    def inventory(self, *, with_config: bool = True) -> Inventory:
        """All qubes, with the features that matter; without ``with_config``, leaves out what listeners are
        told.
        """

    def set_feature(self, qube: QubeName, key: str, value: str) -> None:
        """``vm-config.`` ones reach a running qube at once, others at its start."""

    def remove_feature(self, qube: QubeName, key: str) -> None:
        """It need not exist."""

    def read_policy(self) -> PolicyFile:
        """The policy file that qvm-forward writes."""

    def replace_policy(self, text: str, token: str) -> None:
        """Raises `ChangedError` if the file is another, `StoreError` if it would make policy unreadable."""

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        """Call ``NAME+ARGUMENT`` in a running qube with ``given`` as input; what it answers is untrusted.

        Several threads may ask at once. Raises `AnswerError` unless the call ends with status 0, in time
        (`answers.ANSWER_TIMEOUT_S`) and after at most ``max_bytes``.
        """

    def verdicts(self, calls: Sequence[PolicyCall]) -> list[PolicyVerdict]:
        """What dom0's whole policy decides about calls, as if their targets were running."""

    def locked(self) -> AbstractContextManager[None]:
        """Exclude other changes. Raises `StoreError` if they are not done within 10 s."""

    def watching(self) -> AbstractContextManager[None]:
        """Lets `unwatched` see that `watch` is running. Raises `StoreError` if another one is."""

    def unwatched(self) -> str | None:
        """The command that starts `watch`, if it is not running; None if it is."""

    def read_only(self) -> str | None:
        """Why nothing can be changed from here; None if it can, or if only trying would tell."""

    def changes(self, wakers: Sequence[int] = ()) -> AbstractContextManager[Changes]:
        """The news. ``wakers`` are descriptors that end a wait while they are readable."""


def put(backend: Backend, qube: QubeName, key: str, value: str | None) -> None:
    """Set a feature, or without a value remove it. Raises `StoreError`."""
    if value is None:
        backend.remove_feature(qube, key)
    else:
        backend.set_feature(qube, key, value)
