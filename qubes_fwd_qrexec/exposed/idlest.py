# SPDX-License-Identifier: GPL-2.0-or-later
"""Which call ends where others need its place (`callbudget`): plain functions of who holds what.

Nobody makes room who has no more than its share, nor does a connection in which something moves.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Protocol

from .callplace import Place
from .callqueue import Key, Kind, count_key, has_more_than_its_share

# A connection in which something moves is not ended to make room for another.
QUIET_S = 1.0


class Held(Protocol):
    """How many calls each key holds; see `CallQueue`."""

    def held(self, key: Key) -> tuple[int, ...]: ...

    def has_more_than_its_share(self, holder: Key, waiting: Key) -> bool: ...


def idlest_mux_call(places: Iterable[Place]) -> Place | None:
    """The least recently used mux call that nothing uses now."""
    return max(
        (place for place in places if place.wanted.kind is Kind.MUX and place.quiet_s >= 0),
        key=lambda place: place.quiet_s,
        default=None,
    )


def idlest_single(places: Iterable[Place], waiting: Key, singles: Held) -> Place | None:
    """The idlest single call of the key that holds most, if that is more than the waiting one's share."""
    candidates = (
        place
        for place in places
        if place.wanted.kind is Kind.SINGLE
        and place.quiet_s >= QUIET_S
        and singles.has_more_than_its_share(place.wanted.key, waiting)
    )
    return max(candidates, key=lambda place: (singles.held(place.wanted.key), place.quiet_s), default=None)


def idlest_of_one_user(
    places: Iterable[Place], users: Collection[Key], everybody: Iterable[Place]
) -> Place | None:
    """The idlest mux call with a single client, if that has more of them, among ``everybody``, than one that
    waits."""
    held_by = Counter[Key]()
    for place in everybody:
        if (use := place.sole_user) is not None:
            count_key(held_by, use[0])
    found, most = None, (0, 0.0)
    for place in places:
        if (use := place.sole_user) is None or use[1] < QUIET_S:
            continue
        rank = held_by[use[0][:1]], use[1]
        if rank > most and any(has_more_than_its_share(held_by, use[0], user) for user in users):
            found, most = place, rank
    return found
