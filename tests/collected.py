# SPDX-License-Identifier: GPL-2.0-or-later
"""A list that trio's thread fills."""

from typing import TypeVar

import trio
from helpers import BOUND_S

Item = TypeVar("Item")


class Collected(list[Item]):
    """A list that trio's thread appends to, and whose length can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting = trio.lowlevel.ParkingLot()

    def append(self, item: Item) -> None:
        super().append(item)
        self._waiting.unpark_all()

    async def reach(self, count: int) -> None:
        with trio.fail_after(BOUND_S):
            while len(self) < count:
                await self._waiting.park()
