# SPDX-License-Identifier: GPL-2.0-or-later
"""How long calls wait, for a place and after a refusal."""

from dataclasses import dataclass, field

# How long a call may wait for a place.
WAIT_S = 30.0
# How long to wait between tries, while somebody waits.
AGAIN_S = 2.0
# How long a refusal beside live calls may mean a full target, if no such call has been allowed yet.
DOUBT_S = 5.0


@dataclass(frozen=True, slots=True)
class CallWaits:
    """In seconds: ``wait_s`` for a place, ``again_s`` between tries, ``doubt_s`` for which a refusal beside
    live calls may mean a full target."""

    wait_s: float = field(default_factory=lambda: WAIT_S)
    again_s: float = field(default_factory=lambda: AGAIN_S)
    doubt_s: float = field(default_factory=lambda: DOUBT_S)
