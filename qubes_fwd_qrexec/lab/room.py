# SPDX-License-Identifier: GPL-2.0-or-later
"""How many calls there is room for: by the slots of a target's daemon, and by a caller's grant pages.
Facts: qubes-core-qrexec daemon/qrexec-daemon.c (`allocate_vchan_port`); qubes-core-vchan-xen, whose
server is the caller's client: two rings and one page for each vchan, a small ring within that page.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from . import wire
from .knobs import Knobs

_PAGE_BYTES = 4096
# libxenvchan init.c: MAX_SMALL_RING and MAX_LARGE_RING lie in the shared page.
_RINGS_IN_PAGE_BYTES = 2048

# libxengnttab and qrexec-agent-data.c, and what is printed where xenstored refuses a transaction.
_NO_PAGES = "gntshr: error: ioctl failed: No space left on device\nData vchan connection failed\n"
_NO_TRANSACTION = "Data vchan connection failed\n"


class NoVchanError(Exception):
    """The caller's client cannot make its vchan; the text is what it prints."""


class Room:
    """Counts by the names of qubes; ``targets`` has the slots that are taken."""

    def __init__(self) -> None:
        self.targets: Counter[str] = Counter()
        self._pages: Counter[str] = Counter()
        self._begun: Counter[str] = Counter()

    @contextmanager
    def vchan(self, caller: str, buffer_size: int, knobs: Knobs) -> Iterator[None]:
        """Take the caller's pages for one call, for the length of a block; raises `NoVchanError`."""
        pages = _pages(buffer_size)
        if self._pages[caller] + pages > knobs.vchans_per_caller * _pages(wire.BUFFER_SIZE):
            raise NoVchanError(_NO_PAGES)
        self._pages[caller] += pages
        try:
            yield
        finally:
            self._pages[caller] -= pages

    @contextmanager
    def beginning(self, caller: str, knobs: Knobs) -> Iterator[None]:
        """A call between dom0's yes and its data connection; raises `NoVchanError`."""
        if knobs.begun_at_once and self._begun[caller] >= knobs.begun_at_once:
            raise NoVchanError(_NO_TRANSACTION)
        self._begun[caller] += 1
        try:
            yield
        finally:
            self._begun[caller] -= 1


def _pages(buffer_size: int) -> int:
    ring = 1 << max(0, buffer_size - 1).bit_length()
    return 1 + (0 if ring <= _RINGS_IN_PAGE_BYTES else 2 * max(1, ring // _PAGE_BYTES))
