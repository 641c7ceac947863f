# SPDX-License-Identifier: GPL-2.0-or-later
"""One holds a lock, others are told so, and whoever only looks does no harm."""

import os
from pathlib import Path

import pytest
from helpers import without_rights

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.system.lockfile import hold, is_held, why_not


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def test_one_holds_it_until_its_block_ends(path: Path) -> None:
    assert not is_held(path)
    with hold(path, 0, "busy"):
        assert is_held(path)
        with pytest.raises(StoreError, match=r"/lock: busy$"), hold(path, 0, "busy"):
            pass
    assert not is_held(path)


def test_it_is_free_after_an_error(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), hold(path, 0, "busy"):
        raise KeyboardInterrupt
    with hold(path, 0, "busy"):
        pass


def test_who_cannot_take_it_is_told_why_without_trying(path: Path) -> None:
    assert why_not(path) is None
    with without_rights(path.parent):
        assert why_not(path) == f"{path.parent}: Permission denied"
    with hold(path, 0, "busy"):
        assert why_not(path) is None
    missing = path.parent / "none" / "lock"
    assert why_not(missing) == f"{missing.parent}: Permission denied"


def test_the_group_can_take_it_too_whatever_the_umask(path: Path) -> None:
    old = os.umask(0o077)
    try:
        with hold(path, 0, "busy"):
            pass
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o660


def test_one_that_cannot_be_made_says_who_can(tmp_path: Path) -> None:
    refused = pytest.raises(StoreError, match=r"none/lock: No such file or directory; as root$")
    with refused, hold(tmp_path / "none" / "lock", 0, "busy", "; as root"):
        pass


def test_a_link_is_not_followed_and_in_doubt_it_is_held(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    with pytest.raises(StoreError), hold(path, 0, "busy"):
        pass
    assert not path.with_name("other").exists()
    assert is_held(path)
