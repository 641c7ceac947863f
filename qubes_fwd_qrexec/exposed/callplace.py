# SPDX-License-Identifier: GPL-2.0-or-later
"""A place among all qrexec calls of this qube (`callbudget`): a call that may be made, and who uses it."""

from typing import Protocol

from .callqueue import Key, Wanted


class Holder(Protocol):
    """The user of a call, which may have to make room for another."""

    @property
    def quiet_s(self) -> float | None:
        """For how many seconds nothing has used it; None if it must not be ended."""

    @property
    def sole_user(self) -> tuple[Key, float] | None:
        """The only client that uses a mux call, and for how many seconds nothing has moved in it."""

    def make_room(self) -> None:
        """End it; its place comes back soon."""


class Reports(Protocol):
    """Who is told what becomes of the call of a place: `callbudget`. The methods are those of `Place`."""

    def is_through(self, place: "Place") -> None: ...

    def failed(self, place: "Place", why: str, status: int | None) -> bool: ...

    def lost(self, place: "Place", why: str) -> None: ...


class Place:
    """A call that may be made. Its user reports what becomes of the call."""

    def __init__(self, budget: Reports, wanted: Wanted, now: float) -> None:
        self.wanted = wanted
        self.began_at = now
        self.is_through = False
        """Whether dom0 and the target are known to have taken the call."""
        self.has_failed = False
        """Whether the call has failed before it was through; it takes no room any more."""
        self.holder: Holder | None = None
        self.makes_room = False
        self._budget = budget

    @property
    def quiet_s(self) -> float:
        """For how many seconds nothing has used it; below 0 if it must not be ended."""
        quiet_s = None if self.holder is None else self.holder.quiet_s
        return -1.0 if quiet_s is None else quiet_s

    @property
    def sole_user(self) -> tuple[Key, float] | None:
        """See `Holder`."""
        return None if self.holder is None else self.holder.sole_user

    def through(self) -> None:
        """dom0 and the target have taken the call; a second report changes nothing."""
        self._budget.is_through(self)

    def make_room(self) -> None:
        """Have the holder end the call."""
        self.makes_room = True
        if self.holder is not None:
            self.holder.make_room()

    def failed(self, why: str, status: int | None = None) -> bool:
        """The call failed before it was through. Returns True if there was no room: the user may ask for
        another place at once, and waits until there is room."""
        return self._budget.failed(self, why, status)

    def lost(self, why: str) -> None:
        """The call was through, and was lost or given up: the same is tried again only after a while."""
        self._budget.lost(self, why)
