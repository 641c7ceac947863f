# SPDX-License-Identifier: GPL-2.0-or-later
"""A program's machine, as a test has it: its clock, and whether it is the dom0 of a Qubes system.

Two variables say that. ``PLAYED_CLOCK`` names a file with the time in UNIX seconds. ``PLAYED_DOM0`` names a
lab, whose qubes are those of the Qubes system: `fake_admin` is its Admin API, `playedevents` tells what
happens in it, and what a qube answers to a call lies beside the lab, in ``answers/QUBE/SERVICE``. A program
that such a program starts is on the same machine. It finds Debian's PyGObject, see `debiangi`.
"""

import os
import sys
import time
from pathlib import Path

_TESTS = Path(__file__).parents[2]
_WINDOW = _TESTS / "window"


def begin() -> None:
    """Before anything else of the program is imported."""
    sys.path.append(str(_WINDOW))
    import debiangi

    debiangi.offer()
    if clock := os.environ.get("PLAYED_CLOCK"):
        time.time = lambda: float(Path(clock).read_text())
    if lab := os.environ.get("PLAYED_DOM0"):
        sys.path += [str(_TESTS), str(_TESTS / "admin")]
        _be_dom0(Path(lab))


def _be_dom0(place: Path) -> None:
    import playedevents
    import pytest
    from fake_admin import FakeQubes, install
    from fake_policy import FakePolicyClient
    from playedlab import RememberedLab

    from qubes_fwd_qrexec.admin.qubes import events
    from qubes_fwd_qrexec.admin.views import locate

    lab = RememberedLab.open(place)
    system = FakeQubes(lab)
    system.root = root_beside(place)
    system.says = _Answers(place.parent / "answers")
    install(pytest.MonkeyPatch(), system, FakePolicyClient(lab))
    sys.modules["qubesadmin.events"] = playedevents.module(lab)
    locate.open_backend.__defaults__ = (str(system.root),)
    events.POLICY_DIR = lab.policy_dir


def root_beside(lab: Path) -> Path:
    """The root of the file system of that dom0; made if it is not there."""
    root = lab.parent / "root"
    for directory in ("etc", "run/qubes"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    (root / "etc/qubes-release").touch()
    return root


class _Answers(dict[tuple[str, str], bytes]):
    """What qubes answer, read when they are asked."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def get(self, key: tuple[str, str], default: bytes | None = None) -> bytes | None:  # type: ignore[override]
        path = self._place.joinpath(*key)
        return path.read_bytes() if path.exists() else default
