# SPDX-License-Identifier: GPL-2.0-or-later
"""Time zones for tests of local times."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def zone(name: str) -> Iterator[None]:
    """Local times are those of a zone, such as XST-2, which is two hours ahead of UTC."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TZ", name)
    time.tzset()
    try:
        yield
    finally:
        patch.undo()
        time.tzset()
