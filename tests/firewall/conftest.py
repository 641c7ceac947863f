# SPDX-License-Identifier: GPL-2.0-or-later
"""A path of qubes."""

import pytest
from wired import Wired


@pytest.fixture
def wired(fresh: Wired) -> Wired:
    return fresh
