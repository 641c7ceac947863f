# SPDX-License-Identifier: GPL-2.0-or-later
"""What `growth` measures and `plot` draws."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """What was measured beside ``held`` connections."""

    peer: str
    held: int
    rate: float
    failed: int
    connect_ms: float
    round_trip_ms: float
    upload_mib_s: float
    download_mib_s: float
