# SPDX-License-Identifier: GPL-2.0-or-later
import time

import pytest

from qubes_fwd_qrexec.system.lifetime import Expiry


def test_an_expiry_is_over_by_either_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, boot = [1000.0], [50.0]
    monkeypatch.setattr(time, "time", lambda: wall[0])
    monkeypatch.setattr(time, "clock_gettime", lambda which: boot[0])
    assert not Expiry(None).is_over()
    assert Expiry(1000).is_over()
    expiry = Expiry(1010)
    assert not expiry.is_over()
    wall[0] = 1010
    assert expiry.is_over()
    wall[0] = 0  # set back
    assert not expiry.is_over()
    boot[0] = 60
    assert expiry.is_over()
