# SPDX-License-Identifier: GPL-2.0-or-later
"""What a user saw of a rule when deciding to change it: if it is different now, the change is refused."""

from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import RefusedError, RuleError
from qubes_fwd_qrexec.common.rules import BrokenRule, ForwardRule
from qubes_fwd_qrexec.common.values import QubeName

from .snapshot import Snapshot
from .states import Key


class Seen(NamedTuple):
    """A rule as it was shown: its line, None where there was none, and the netvms of its target, nearest
    first, None where these were not shown.
    """

    line: str | None
    netvms: tuple[QubeName, ...] | None = None

    @classmethod
    def of(cls, snapshot: Snapshot, key: Key) -> "Seen":
        """What a snapshot shows of a rule, be it there or not."""
        stored, chain = snapshot.stored.get(key), snapshot.inventory.chain(key[0])
        if isinstance(stored, BrokenRule):
            return cls(stored.text, chain.qubes)
        return cls(None if stored is None else str(stored.rule), chain.qubes)


class NotAsSeenError(RefusedError):
    """A change was refused: what the user ``saw`` of the rule ``key`` is not what there is ``now``."""

    def __init__(self, key: Key, saw: Seen, now: Seen, done: str) -> None:
        super().__init__(f"{key[0]} {_printable(key[1])} was not {done}: {_difference(key[0], saw, now)}")
        self.key = key
        self.saw = saw
        self.now = now


def check_seen(snapshot: Snapshot, key: Key, saw: Seen, done: str) -> None:
    """Raises `NotAsSeenError` if a rule, or the netvms of its target, are no longer what the user saw. The
    order of options does not matter. ``done`` is the word for what is not done then.
    """
    now = Seen.of(snapshot, key)
    if not _is_same_rule(saw.line, now.line) or saw.netvms not in (None, now.netvms):
        raise NotAsSeenError(key, saw, now, done)


def _is_same_rule(one: str | None, other: str | None) -> bool:
    if one == other or one is None or other is None:
        return one == other
    try:
        return ForwardRule.parse(one) == ForwardRule.parse(other)
    except RuleError:
        return False


def _difference(target: QubeName, saw: Seen, now: Seen) -> str:
    if _is_same_rule(saw.line, now.line):
        was, are = (" - ".join(netvms or ()) or "none" for netvms in (saw.netvms, now.netvms))
        return f"the netvms of {target} were {was} when you looked, and are {are} now"
    if now.line is None:
        return "it no longer exists"
    what = "there is one already," if saw.line is None else "it is not what you saw, but"
    return f"{what} '{_printable(now.line)}'"


def _printable(untrusted_text: str) -> str:
    is_plain = untrusted_text.isascii() and untrusted_text.isprintable()
    return untrusted_text if is_plain else ascii(untrusted_text)[1:-1]
