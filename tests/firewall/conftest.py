# SPDX-License-Identifier: GPL-2.0-or-later
"""A path of qubes, and a directory for programs that do not run as root."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from wired import Wired


@pytest.fixture
def wired(fresh: Wired) -> Wired:
    return fresh


@pytest.fixture
def public_path() -> Iterator[Path]:
    """pytest's own directories are its user's alone, and whatever starts pytest makes them so again."""
    with TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path
