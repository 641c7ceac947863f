# SPDX-License-Identifier: GPL-2.0-or-later
"""What `admin` asks of the system that it runs on: the one interface of the lab and of Qubes.

Inventory is read as a whole; changes are made one by one. An implementation raises `StoreError` for
whatever goes wrong, and says in it what and where.
"""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from qubes_fwd_qrexec.common.config import KEY_MAX, VALUE_MAX
from qubes_fwd_qrexec.common.errors import StoreError, TextError
from qubes_fwd_qrexec.common.values import QubeName, parse_printable

from .inventory import CONFIG_PREFIX, Inventory

# The token of a policy file that does not exist yet, as in qrexec.policy.admin_client.
NEW = "new"
# The token that stands for whatever the file says now: for closing everything, and for nothing else.
ANY = "any"


# qubes-core-admin qubes/api/admin.py, vm_feature_set(); qubes/ext/vm_config.py for what follows "vm-config.".
_FEATURE_NAME = re.compile(r"[a-zA-Z0-9_.-]+\Z", re.ASCII)
_CONFIG_NAME = re.compile(rf"[a-zA-Z].{{0,{KEY_MAX - 1}}}\Z", re.ASCII)


class BadNameError(StoreError):
    """What stands as a feature's name is none."""


def check_feature_name(qube: QubeName, key: str) -> None:
    """Raises `BadNameError` for what no call may name as a feature."""
    if not _FEATURE_NAME.match(key):
        raise BadNameError(f"{qube}: {key!a} is no feature's name, which has only [a-zA-Z0-9_.-]")


def check_feature(qube: QubeName, key: str, value: str) -> None:
    """Raises `StoreError` for what must not be set, before anything is.

    Qubes itself looks at all but the length of ``vm-config.`` values, some of it only once it is set; and
    before 4.3 at less.
    """
    check_feature_name(qube, key)
    try:
        parse_printable(value)
    except TextError as error:
        raise StoreError(f"{qube}: feature {key}: {error}") from error
    if key.startswith(CONFIG_PREFIX):
        if not _CONFIG_NAME.match(key.removeprefix(CONFIG_PREFIX)):
            raise StoreError(
                f"{qube}: {key} must have 1 to {KEY_MAX} characters after {CONFIG_PREFIX!r}, a letter first"
            )
        if len(value) > VALUE_MAX:
            raise StoreError(
                f"{qube}: the value of {key} has {len(value)} bytes, and QubesDB takes at most {VALUE_MAX}"
            )


class ChangedError(StoreError):
    """Somebody else has changed the policy file since it was looked at, and it is left as they wrote it."""

    def __init__(self, place: object) -> None:
        super().__init__(f"{place}: somebody else changed it just now; try again")


class PolicyFile(NamedTuple):
    """The policy file as it was read; ``token`` stands for exactly this text, which is None if missing."""

    text: str | None
    token: str


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
    """News that anything which plan, configuration or policy are made from has changed; never what."""

    def wait(self, timeout_s: float | None) -> bool:
        """Block until something has changed: True, and all that is there by then counts as one. False
        after ``timeout_s``, and as soon as one of the wakers is readable.

        The first call connects to where the news comes from, and returns True when that stands: nothing
        was told of what was before. Raises `StoreError` when it does not, or is lost: begin anew then.
        """


class Backend(Protocol):
    """A system of qubes. Nothing here locks by itself: whoever changes things holds `locked`."""

    def inventory(self, *, with_config: bool = True) -> Inventory:
        """All qubes as they are now, with those of their features that `inventory.feature_matters` names.

        Without ``with_config`` the features that tell listeners are left out: a real system is asked for
        each by itself, and most commands look at none of them.
        """

    def set_feature(self, qube: QubeName, key: str, value: str) -> None:
        """Set one feature; ``vm-config.`` ones reach a running qube at once, others at its start."""

    def remove_feature(self, qube: QubeName, key: str) -> None:
        """Remove one feature, and what the qube sees of it; it need not exist."""

    def read_policy(self) -> PolicyFile:
        """The policy file that qvm-forward writes."""

    def replace_policy(self, text: str, token: str) -> None:
        """Replace the policy file as a whole. Raises `ChangedError` if it is not what ``token`` stood for
        any more, and `StoreError` if dom0's policy could not be read with it. The token `ANY` is for every
        file, read or not.
        """

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        """Make a qrexec call from dom0 (``NAME+ARGUMENT``) with ``given`` as input, and return what it says.

        A halted qube is not started. Raises `answers.AnswerError` unless it ended with status 0, in time and
        with at most ``max_bytes``, and `answers.NotRunningError` where nothing runs that could answer. What
        is returned is untrusted. Without ``timeout_s`` it has `answers.ANSWER_TIMEOUT_S`. Several threads may
        ask at once.
        """

    def verdicts(self, calls: Sequence[PolicyCall]) -> list[PolicyVerdict]:
        """What dom0's whole policy, read once and by its own parser, says of calls to targets that run."""

    def locked(self, timeout_s: float | None = None) -> AbstractContextManager[None]:
        """Exclude all others that change rules, configuration or policy through a backend.

        Raises `StoreError` if they are not done within 10 s, or within ``timeout_s``, which may be 0.
        """

    def watching(self) -> AbstractContextManager[None]:
        """For as long as it is entered, `unwatched` knows that `watch` runs. Raises `StoreError` if another
        one does.
        """

    def unwatched(self) -> str | None:
        """What starts `watch`, where it does not run; None where it does."""

    def changes(self, wakers: Sequence[int] = ()) -> AbstractContextManager[Changes]:
        """For as long as it is entered, the news. ``wakers`` are descriptors that end a wait while they
        are readable; nobody reads them here.
        """
