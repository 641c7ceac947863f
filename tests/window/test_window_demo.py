# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvm-forward-lab window``: forwards with traffic in the window, and nothing left when it is closed."""

from pathlib import Path
from typing import TYPE_CHECKING

from desktop import Desktop
from helpers import BOUND_S
from stories import PLAYED, TITLE, Show

from qubes_fwd_qrexec.lab.inhabitants import inhabitants

if TYPE_CHECKING:
    from reader import Reader


def test_the_demo_shows_forwards_with_clients_and_ends_with_its_window(
    reader: "Reader", show: Show, desktop: Desktop, tmp_path: Path
) -> None:
    environ = {"PYTHONPATH": str(PLAYED), "TMPDIR": str(tmp_path)}
    # The indicator has notices to show.
    show([str(PLAYED.parent / "notifyserver.py")], environ)
    demo = show(["-m", "qubes_fwd_qrexec.lab.cli", "window"], environ)
    reader.why_in_vain = demo.why_not
    reader.reads("3 ports are open, 1 of them to anybody", TITLE)
    reader.select("127.0.0.0/8", TITLE)
    reader.reads("127.0.0.2", TITLE)
    (lab,) = tmp_path.glob("qvm-forward-lab-*/lab")
    reader.why_in_vain = str
    desktop.focus(TITLE)
    desktop.key("ctrl+q")
    assert demo.process.wait(BOUND_S) == 0
    assert inhabitants(lab) == []
    assert not lab.exists()
