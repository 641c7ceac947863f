# SPDX-License-Identifier: GPL-2.0-or-later
"""What this version can do, in one place: a rule may ask for more, and is then refused with a reason.

Switch an ability on here when its machinery is there; plan, policy and configuration follow.
"""

from typing import NamedTuple


class Abilities(NamedTuple):
    """Each is one thing that rules can ask for."""

    nft: bool = False
    mux: bool = True
    proxy: bool = True
    limits: bool = True


THIS_VERSION = Abilities()
