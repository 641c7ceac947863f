# SPDX-License-Identifier: GPL-2.0-or-later
"""Systems to try dom0's side on, and a desktop for programs that work on them."""

import gc
import sys
from collections.abc import Iterator

import pytest
from stories import desktop, machine, reader, show, window  # noqa: F401
from systems import *  # noqa: F403


@pytest.fixture(autouse=True)
def _left_as_it_was() -> Iterator[None]:
    """A modal dialog that a test leaves, as a failed one does, keeps other windows from being closed.

    And as in the program, no widget is looked for as garbage by another thread.
    """
    gc.disable()
    yield
    gc.enable()
    if "screen" in sys.modules:
        sys.modules["screen"].end_grabs()
