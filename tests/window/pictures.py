# SPDX-License-Identifier: GPL-2.0-or-later
"""Takes the pictures of the window for README and guide, into docs/pictures: ``make pictures``.

Each is taken of a program on a screen of its own, in the dom0 of a Qubes system whose clock stands still, so
that the same window makes the same picture.

    python tests/window/pictures.py            take all, each in a process of its own
    python tests/window/pictures.py NAME...    take these
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS / "admin")]

from desktop import Desktop, open_desktop  # noqa: E402
from listenersays import status  # noqa: E402
from stories import MANAGER, TITLE, Machine, Shown  # noqa: E402
from systems import QUBES  # noqa: E402

from qubes_fwd_qrexec.admin.qubes.store import QubesStore  # noqa: E402
from qubes_fwd_qrexec.common.services import STATUS_SERVICE  # noqa: E402
from qubes_fwd_qrexec.common.values import QubeName  # noqa: E402
from qubes_fwd_qrexec.lab.blueprint import create_lab  # noqa: E402
from qubes_fwd_qrexec.lab.directory import LabDirectory  # noqa: E402
from qubes_fwd_qrexec.lab.qube import LABELS, Qube  # noqa: E402

if TYPE_CHECKING:
    from reader import Reader

_ROOT = _TESTS.parent
PLACE = _ROOT / "docs" / "pictures"
# 2026-06-15 10:00 UTC.
_NOW = 1_781_517_600
_LAN = "--from=192.168.0.0/16"
_RULES = (
    ("work", "80:8080", "--name=web", _LAN, "--expire=+7h", "--comment=the team's page"),
    ("work", "443:8443", "--name=photos", "--from=any", "--expire=+25m", "--comment=for the party"),
    ("work", "2222:22", "--name=ssh", _LAN, "--disabled"),
    ("personal", "3000", "--name=wiki", "--from=10.0.0.0/8"),
    ("vault", "5353:53", "--name=names", "--proto=udp", "--from=10.0.0.0/8", "--via=sys-net"),
)
_REFUSED = (
    "action=forward srcports=9000 srchosts=any via=sys-net owner=untrusted path=sys-vpn,sys-firewall,sys-net"
)
_EDITOR, _CONFIRMATION, _DIAGNOSIS = "Add a forward", "Confirm a forward", "Diagnosis of work web"
_GERMAN = "Qubes-Portweiterleitungen"
_LARGE = (1400, 1000)
_MANY = 200
_COLOURS = "64"


def _forward(machine: Machine, *words: str) -> None:
    """Run qvm-forward."""
    words = (sys.executable, "-m", "qubes_fwd_qrexec.admin.views.cli", *words)
    subprocess.run(words, env={**os.environ, **machine.environ}, check=True, capture_output=True)


def _none(lab: LabDirectory, machine: Machine) -> None:
    """Nothing is there."""


def _some(lab: LabDirectory, machine: Machine) -> None:
    """Forwards in all states, one of them with clients."""
    for rule in _RULES:
        _forward(machine, "add", *rule, "--mode=qrexec")
    lab.write_qube(replace(lab.qube("personal"), netvm=QubeName("sys-net")))
    lab.set_feature("sys-net", "supported-rpc.qubes.ForwardTCP", "1")
    _forward(machine, "apply")
    lab.set_feature("untrusted", "forward.test", _REFUSED)
    lab.set_feature("untrusted", "forward.typo", "action=forward srcport=9001 srchosts=any")
    for argument in ("", "clients"):
        machine.answer("sys-net", f"{STATUS_SERVICE}+{argument}", json.dumps(status(_NOW)).encode())
    tried = {"answer": "refused", "reason": "server", "text": "connection refused"}
    machine.answer("work", f"{STATUS_SERVICE}+8080", json.dumps(status(_NOW) | {"trial": tried}).encode())


def _many(lab: LabDirectory, machine: Machine) -> None:
    """As many forwards as fit nobody's screen."""
    for number in range(_MANY // 4):
        label = LABELS[number % len(LABELS)]
        name = QubeName(f"project-{number}")
        netvm = QubeName("sys-firewall")
        lab.write_qube(Qube(name=name, netvm=netvm, template=QubeName("fedora-42"), label=label))
        for port in range(4):
            rule = (
                f"action=forward srcports={1000 + 10 * number + port} dstports=80 srchosts=192.168.0.0/16 "
                f"owner={name} path=sys-firewall,sys-net"
            )
            lab.set_feature(name, f"forward.web-{port}", rule if port else f"{rule} enabled=no")
    _forward(machine, "apply")


def _look(user: "Reader", desktop: Desktop) -> None:
    """At the forward that has clients."""
    user.select("sys-net:80")
    user.reads("192.168.1.71")


def _only_look(user: "Reader", desktop: Desktop) -> None:
    user.reads("Nothing on this machine can be reached")


def _add(user: "Reader", desktop: Desktop) -> None:
    _look(user, desktop)
    user.press("Add…", TITLE)
    user.write("Qube", "work", _EDITOR)
    user.write("Server port", "8000", _EDITOR)
    user.choose("Anybody who can reach it", _EDITOR)
    user.reads("Connections to port 8000 of sys-net", _EDITOR)
    desktop.focus(_EDITOR)


def _confirm(user: "Reader", desktop: Desktop) -> None:
    user.select("SUSPENDED")
    user.press("Confirm…", TITLE)
    user.find("Confirm", window=_CONFIRMATION)
    desktop.focus(_CONFIRMATION)


def _diagnose(user: "Reader", desktop: Desktop) -> None:
    _look(user, desktop)
    user.press("Diagnose…", TITLE)
    user.find("Try again", window=_DIAGNOSIS)


def _filter(user: "Reader", desktop: Desktop) -> None:
    user.reads(f"{3 * _MANY // 4} ports are open")


class Picture(NamedTuple):
    """Of a system, after what the user did there, on a screen of that size with settings of the session.

    It is of the window ``title``; ``main`` is the title of the program's own.
    """

    system: Callable[[LabDirectory, Machine], None] = _some
    act: Callable[["Reader", Desktop], None] = _look
    size: tuple[int, int] = (1180, 860)
    settings: Mapping[str, str] = {}
    title: str = TITLE
    main: str = TITLE


PICTURES = {
    "window-light": Picture(),
    "window-dark": Picture(settings={"GTK_THEME": "Adwaita:dark"}),
    "window-small": Picture(size=(800, 600)),
    "window-empty": Picture(_none, _only_look),
    "window-many": Picture(_many, _filter),
    "window-german": Picture(settings={"LANGUAGE": "de"}, title=_GERMAN, main=_GERMAN),
    "add": Picture(act=_add, size=_LARGE, title=_EDITOR),
    "confirm": Picture(act=_confirm, size=_LARGE, title=_CONFIRMATION),
    "diagnose": Picture(act=_diagnose, size=_LARGE, title=_DIAGNOSIS),
}


def take(name: str) -> None:
    """Take one picture, as a PNG of few colours."""
    picture = PICTURES[name]
    with tempfile.TemporaryDirectory(prefix="picture-") as place:
        lab = create_lab(Path(place, "lab"))
        machine = Machine(lab, QUBES)
        machine.set_clock(_NOW)
        _forward(machine, "apply")
        picture.system(lab, machine)
        settings = {"XDG_DATA_DIRS": f"{_ROOT}:/usr/local/share:/usr/share"} | picture.settings
        settings["QUBES_FORWARD_LOCALE"] = str(_ROOT / "build" / "locale")
        with (
            QubesStore(lab.root.parent / "root").watching(),
            open_desktop(*picture.size, **settings) as desktop,
        ):
            from reader import Reader

            user = Reader(desktop)
            said = Path(place, "stderr")
            words = [sys.executable, "-P", "-c", MANAGER]
            user.why_in_vain = Shown(desktop.start(words, machine.environ, said), said).why_not
            user.until(lambda: user.seen(picture.main), "the window is there")
            desktop.clear_pointer()
            desktop.size(picture.main, *picture.size)
            desktop.focus(picture.main)
            picture.act(user, desktop)
            user.settle()
            _save(PLACE / f"{name}.png", desktop, picture.title)


def _save(path: Path, desktop: Desktop, title: str) -> None:
    path.parent.mkdir(exist_ok=True)
    words = ["import", "-window", desktop.number(title)]
    few = ("-strip", "-dither", "None", "-colors", _COLOURS, "-define", "png:exclude-chunks=date,time")
    subprocess.run([*words, *few, f"png8:{path}"], env=dict(desktop.environ), check=True)
    print(f"{path.relative_to(_ROOT)}: {path.stat().st_size // 1024} KiB", flush=True)


def main() -> None:
    names = sys.argv[1:]
    if len(names) == 1:
        return take(names[0])
    for name in names or PICTURES:
        # libatspi knows one desktop in the life of a process.
        subprocess.run([sys.executable, __file__, name], check=True)
    return None


if __name__ == "__main__":
    main()
