# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``qvm-forward-lab window`` needs of a machine, it names where it is missing."""

from pathlib import Path

import pytest

from qubes_fwd_qrexec.lab.demo_window import find_gtk
from qubes_fwd_qrexec.lab.session import SessionError


def python(path: Path, status: int) -> str:
    """A Python that says of itself whether it has GTK and a display, as its exit status."""
    path.write_text(f"#!/bin/sh\nexit {status}\n")
    path.chmod(0o755)
    return str(path)


def test_the_first_python_with_gtk_is_taken(tmp_path: Path) -> None:
    pythons = [python(tmp_path / "venv", 3), python(tmp_path / "debian", 0), python(tmp_path / "other", 0)]
    assert find_gtk(pythons) == pythons[1]


def test_without_gtk_the_packages_are_named(tmp_path: Path) -> None:
    packages = r"python3-gi and gir1\.2-gtk-3\.0 on Debian, python3-gobject and gtk3 on Fedora"
    with pytest.raises(SessionError, match=packages):
        find_gtk([python(tmp_path / "venv", 3), str(tmp_path / "missing")])


def test_without_a_display_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="there is no display"):
        find_gtk([python(tmp_path / "debian", 4)])
