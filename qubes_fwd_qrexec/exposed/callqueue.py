# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may make a qrexec call next: counting and comparing, without a socket, a task or a clock.

A qube has room for few calls at once (`callbudget`), so wanted calls wait here. Renewals of leases come
first, then mux calls, then single calls. The next single call is for the rule that holds the fewest calls,
within the rule for the client that holds the fewest, and among those the one that has waited longest.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from enum import IntEnum
from itertools import count
from typing import Generic, TypeVar

# A quarter of the kernel's default listen queue. Each one is an open connection and nothing else.
WAITING_MAX = 1024

Key = tuple[Hashable, ...]
"""For whom a call is made, the widest first: rule, network, client address."""


class Kind(IntEnum):
    """What a call is for, in the order in which they are served."""

    RENEWAL = 0
    """dom0 says once more that a mux call may go on; it ends at once."""
    MUX = 1
    SINGLE = 2
    """One connection over a call of its own."""


class Wanted:
    """A call that somebody waits for."""

    __slots__ = ("key", "kind", "service", "target")

    def __init__(self, kind: Kind, target: str, service: str, key: Key = ()) -> None:
        self.kind = kind
        self.target = target
        self.service = service
        self.key = key


_W = TypeVar("_W", bound=Wanted)


class CallQueue(Generic[_W]):
    """The calls that wait, and how many each rule and each client holds."""

    def __init__(self, waiting_max: int = WAITING_MAX) -> None:
        self._waiting_max = waiting_max
        self._waiting: dict[_W, int] = {}
        self._singles: dict[Key, dict[_W, None]] = {}
        self._waiting_by: Counter[Key] = Counter()
        self._held_by: Counter[Key] = Counter()
        self._order = count()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[_W]:
        """In the order in which they would be served now."""
        return iter(sorted(self._waiting, key=self._rank))

    def add(self, wanted: _W) -> _W | None:
        """Let ``wanted`` wait. If too many wait, returns the one removed for it, perhaps ``wanted`` itself.

        That is the newest one of the key with most waiting. Renewals and mux calls are never removed.
        """
        self._waiting[wanted] = next(self._order)
        count_key(self._waiting_by, wanted.key)
        if wanted.kind is Kind.SINGLE:
            self._singles.setdefault(wanted.key, {})[wanted] = None
        if len(self._waiting) <= self._waiting_max or wanted.kind is not Kind.SINGLE:
            return None
        lasts = (next(reversed(of_one)) for of_one in self._singles.values())
        last = max(lasts, key=lambda one: (*_counts(self._waiting_by, one.key), self._waiting[one]))
        self.remove(last)
        return last

    def remove(self, wanted: _W) -> None:
        """Stop waiting; does nothing if it does not wait."""
        if self._waiting.pop(wanted, None) is not None:
            count_key(self._waiting_by, wanted.key, -1)
            of_one = self._singles.get(wanted.key, {})
            of_one.pop(wanted, None)
            if not of_one:
                self._singles.pop(wanted.key, None)

    def first(self, may_begin: Callable[[_W], bool]) -> _W | None:
        """The one that is served first of those that may begin."""
        return min(filter(may_begin, self._waiting), key=self._rank, default=None)

    def begin(self, wanted: _W) -> None:
        """It waits no more, and counts as a call until `release`."""
        self.remove(wanted)
        count_key(self._held_by, wanted.key, 1)

    def release(self, key: Key) -> None:
        """A call of that key is over."""
        count_key(self._held_by, key, -1)

    def held(self, key: Key) -> tuple[int, ...]:
        """How many calls the key holds on each level: those of its rule, its network, its client."""
        return _counts(self._held_by, key)

    def has_more_than_its_share(self, holder: Key, waiting: Key) -> bool:
        """Whether ``holder`` would still hold no less than ``waiting`` if it gave one call to it."""
        return has_more_than_its_share(self._held_by, holder, waiting)

    def _rank(self, wanted: _W) -> tuple[int, ...]:
        return (wanted.kind, *_counts(self._held_by, wanted.key), self._waiting[wanted])


def count_key(counter: Counter[Key], key: Key, change: int = 1) -> None:
    """Count for each level of the key."""
    for length in range(1, len(key) + 1):
        counter[key[:length]] += change
        if not counter[key[:length]]:
            del counter[key[:length]]


def has_more_than_its_share(held_by: Counter[Key], holder: Key, waiting: Key) -> bool:
    """Whether ``holder`` would still hold no less than ``waiting`` if it gave one of its calls to it."""
    holds, waits_for = _counts(held_by, holder), _counts(held_by, waiting)
    for level, (ours, theirs) in enumerate(zip(holds, waits_for, strict=False)):
        if holder[level] != waiting[level]:
            return ours > theirs + 1
    return len(holder) > len(waiting) and holds[len(waiting)] > 1


def _counts(counter: Counter[Key], key: Key) -> tuple[int, ...]:
    return tuple(counter[key[:length]] for length in range(1, len(key) + 1))
