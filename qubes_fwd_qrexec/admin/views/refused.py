# SPDX-License-Identifier: GPL-2.0-or-later
"""What listeners count as refused or dropped, in words."""

from collections.abc import Mapping

# By the words that are counted: those of a rule's options, of `refusals`, and of the exposed qube.
# qvm-forward-list(1) says more of each.
WORDS = {
    "srchosts": "from sources that are not allowed",
    "side": "from the wrong side",
    "connections": "over the limit of connections",
    "per-source": "over the limit of a client",
    "rate": "over the rate",
    "process": "over what the listener takes",
    "made-room": "ended to make room",
    "policy": "denied by dom0",
    "no-service": "without our service in the target",
    "server": "without a server",
    "busy": "with too many waiting",
    "no-call": "without a call to the target",
    "full": "for want of room",
    "old": "that waited too long",
    "kernel": "that came too fast",
    "refused": "right behind a refusal",
    "target": "in the target",
    "late": "after the end of their flow",
    "unsent": "that could not be sent",
    "too-long": "that were too long",
    "to-many": "by broadcast or multicast",
}


def in_words(counts: Mapping[str, int]) -> str:
    """How many of each; empty if there are none. A word that is not known, of a newer listener, stays."""
    return ", ".join(f"{count} {WORDS.get(why, why)}" for why, count in sorted(counts.items()) if count)
