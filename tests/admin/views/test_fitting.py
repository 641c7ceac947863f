# SPDX-License-Identifier: GPL-2.0-or-later
"""What is offered on the line of qvm-forward is what the command could take there."""

import subprocess
import sys
from functools import partial

import pytest
from helpers import BOUND_S
from worlds import NOW, Command

from qubes_fwd_qrexec.admin.views import fitting, parser
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore

COMMANDS = {name: parser.subcommands(parser.build())[name] for name in parser.COMMANDS}


@pytest.fixture
def system(over: Command, lab: LabDirectory) -> LabDirectory:
    """Of the forwards of ``work``, ``shut`` is disabled and ``moved`` suspended; ``personal`` has one."""
    forward = partial(over, LabStore(lab))
    forward("add", "work", "80", "--from", "10.0.0.0/8,192.168.0.0/16", "--name", "web", "--expire", "8h")
    forward("add", "work", "82", "--from", "any", "--name", "shut", "--disabled")
    forward("add", "work", "83", "--from", "any", "--name", "moved")
    forward("add", "personal", "81", "--internal", "--from", "work", "--name", "wiki")
    for qube, name, old, new in (
        ("work", "moved", "path=sys-firewall,sys-net", "path=sys-vpn"),
        ("personal", "wiki", "proto=tcp", "proto=both"),
    ):
        line = lab.feature(qube, f"forward.{name}") or ""
        lab.set_feature(qube, f"forward.{name}", line.replace(old, new))
    lab.set_feature("vault", "forward.bad", "x")
    lab.set_feature("sys-vpn", "forward.tunnel", "1")
    return lab


QUBES = ["personal", "sys-firewall", "sys-net", "sys-vpn", "untrusted", "vault", "work"]
NETVMS = ["sys-firewall", "sys-net", "sys-vpn"]
LINES = [
    ("", sorted(COMMANDS)),
    ("re", ["remove", "resume"]),
    ("--l", ["--lab"]),
    ("add ", QUBES),
    ("add work ", []),
    ("add work 80 --mo", ["--mode"]),
    ("add work 80 --mode ", ["auto", "qrexec"]),
    ("add work 80 --mode=q", ["--mode=qrexec"]),
    ("add work 80 --from a", ["any"]),
    ("add work 80 --from any,wo", ["any,work"]),
    ("add work 80 --comment ", []),
    ("add work 80 --name ", []),
    ("add work 80 --via ", NETVMS),
    ("add work 80 --nonsense=", []),
    ("add --autostart wor", ["work"]),
    ("add work 80 --proxy ", ["off", "v1", "v2"]),
    ("add work 80 --proto udp --proxy ", ["off", "v2"]),
    ("add work 80 --proto=udp --transport ", ["auto", "mux"]),
    ("add work 80 --mode nft --pro", ["--proto"]),
    ("add work 80 --mode nft --a", []),
    ("add work 80 --a", ["--autostart"]),
    ("add work 80 --autostart --mode ", ["auto", "qrexec"]),
    ("list work va", ["vault"]),
    ("list wor", ["work"]),
    ("list work wor", []),
    ("ls va", ["vault"]),
    ("status --cl", ["--clients"]),
    ("status va", ["vault"]),
    ("panic ", []),
    ("resume --d", ["--dry-run"]),
    ("tunnel ", ["list", "mark", "unmark"]),
    ("tunnel mark ", ["sys-firewall", "sys-net"]),
    ("tunnel unmark ", ["sys-vpn"]),
    ("tunnel list ", []),
    ("tunnel mark sys-net ", []),
    ("show ", ["personal", "vault", "work"]),
    ("show work ", ["moved", "shut", "web"]),
    ("show work web ", []),
    ("diagnose work w", ["web"]),
    ("export ", ["personal", "vault", "work"]),
    ("export --format=j", ["--format=json"]),
    ("export work --format y", ["yaml"]),
    ("import ", [":file"]),
    ("import --qube wo", ["work"]),
    ("remove vault ", ["bad"]),
    ("remove work web ", ["moved", "shut"]),
    ("rm work s", ["shut"]),
    ("enable ", ["work"]),
    ("enable work ", ["shut"]),
    ("enable personal ", []),
    ("disable ", ["personal", "work"]),
    ("disable work ", ["moved", "web"]),
    ("confirm ", ["work"]),
    ("confirm work ", ["moved"]),
    ("cut ", ["work"]),
    ("cut work ", ["web"]),
    ("cut work web --client ", []),
    ("set ", ["personal", "work"]),
    ("set work ", ["moved", "shut", "web"]),
    ("set work web exp", ["expire+=", "expire="]),
    ("set work shut exp", ["expire="]),
    ("set work web expire=", ["expire=1d", "expire=8h", "expire=never"]),
    ("set work web expire+=", ["expire+=1d", "expire+=1h"]),
    ("set work web --ext", ["--extend"]),
    ("set work shut --ext", []),
    ("set work web --extend ", ["1d", "1h"]),
    ("set work web src", ["srchosts+=", "srchosts-=", "srchosts=", "srcports="]),
    ("set work shut srch", ["srchosts="]),
    ("set work web srchosts=", ["srchosts=any"]),
    ("set work web srchosts-=", ["srchosts-=10.0.0.0/8", "srchosts-=192.168.0.0/16"]),
    ("set personal wiki srchosts+=unt", ["srchosts+=untrusted"]),
    ("set personal wiki srchosts+=a", []),
    ("set personal wiki --int", []),
    ("set work web --int", ["--internal"]),
    ("set work shut --disa", []),
    ("set work web --disa", ["--disabled"]),
    ("set work web srchosts-=10.0.0.0/8,1", ["srchosts-=10.0.0.0/8,192.168.0.0/16"]),
    ("set personal wiki srchosts=work,u", ["srchosts=work,untrusted"]),
    ("set work web mode=", ["mode=auto", "mode=qrexec"]),
    ("set work web --mode ", ["auto", "qrexec"]),
    ("set work web on-expire=d", ["on-expire=drain"]),
    ("set work web follow-netvm=", ["follow-netvm=no", "follow-netvm=yes"]),
    ("set work web via=sys-n", ["via=sys-net"]),
    ("set work web comment=", []),
    ("set work web proxy=v2 tr", ["transport="]),
    ("set work web proxy=v2 transport=", ["transport=auto", "transport=mux"]),
    ("set work web proxy=v2 prox", []),
    ("set work web --proxy=v2 prox", []),
    ("set personal wiki proxy=", ["proxy=off", "proxy=v2"]),
    ("set personal p", ["proto=", "proxy="]),
    ("set personal w", ["wiki"]),
    ("set personal proxy=", ["proxy=off", "proxy=v2"]),
    ("set personal comment=x proxy=", ["proxy=off", "proxy=v2"]),
    ("set work mode=", []),  # of which of three?
    ("set work web nonsense=", []),
    ("nonsense ", sorted(COMMANDS)),
]


def test_what_fits_is_offered_and_nothing_else(system: LabDirectory) -> None:
    environ = {"QVM_FORWARD_LAB": str(system.root)}
    found = {line: fitting.complete(line.split(" "), environ, NOW) for line, _ in LINES}
    assert found == dict(LINES)


def test_the_system_is_the_one_that_the_line_names(system: LabDirectory) -> None:
    for lab in (["--lab", str(system.root)], [f"--lab={system.root}"]):
        assert fitting.complete([*lab, "show", "w"], {}, NOW) == ["work"]


@pytest.mark.parametrize(
    "line",
    ["show ", "show work ", "tunnel mark ", "add ", "add a 1 --via ", "set work web ", "set work web via="],
)
def test_where_the_system_cannot_be_read_nothing_of_it_is_offered(line: str) -> None:
    assert fitting.complete(["--lab", "/nowhere", *line.split(" ")], {}, NOW) == []


def test_options_are_known_without_a_system() -> None:
    assert fitting.complete(["--lab", "/nowhere", "set", "work", "web", "--ext"], {}, NOW) == ["--extend"]
    assert fitting.complete(["--lab", "/nowhere", "add", "work", "80", "--mode", "n"], {}, NOW) == ["nft"]


def test_nft_is_offered_where_each_qube_of_the_path_has_it(system: LabDirectory) -> None:
    """And not beside an option that packets cannot have."""
    environ = {"QVM_FORWARD_LAB": str(system.root)}
    for qube in ("work", "sys-firewall", "sys-net"):
        system.set_feature(qube, "service.qubes-forward-nft", "1")
    for line, modes in (
        ("set work web mode=", ["mode=auto", "mode=nft", "mode=qrexec"]),
        ("set work web proxy=v2 mode=", ["mode=auto", "mode=qrexec"]),
        ("add work 80 --mode ", ["auto", "nft", "qrexec"]),
        ("add work 80 --autostart --mode ", ["auto", "qrexec"]),
        ("add vault 80 --via sys-net --mode ", ["auto", "qrexec"]),
    ):
        assert fitting.complete(line.split(" "), environ, NOW) == modes, line


def test_it_is_soon_there() -> None:
    """Each module takes its part of 150 ms, so none is imported that only commands need."""
    code = (
        "import sys; from qubes_fwd_qrexec.admin.views import cli\n"
        "cli.main(['__complete', '--lab', '/nowhere', 'enable', 'work', ''])\n"
        "print(*(name for name in sys.modules if name.startswith('qubes_fwd_qrexec')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, check=True, timeout=BOUND_S
    )
    modules = done.stdout.split()
    assert len(modules) < 50
    for name in ("admin.changing", "admin.views.session", "admin.views.changes", "lab.daemon"):
        assert f"qubes_fwd_qrexec.{name}" not in modules
