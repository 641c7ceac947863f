# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab with many rules, and qvm-forward run on it as a program of its own."""

import random
import subprocess
import sys
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import NamedTuple

from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import Qube

_NETVMS = ("sys-firewall", "sys-firewall", "sys-firewall", "sys-vpn")
# A range of ports for each rule, none twice.
_FIRST_PORT, _LAST_PORT = 1000, 65000
_LIMIT_S = 120


class Spent(NamedTuple):
    """What something took, by the clock and of processors: in a program, all that it has started too."""

    seconds: float
    processor_s: float


def make_lab(path: Path, qubes: int, rules: int) -> LabDirectory:
    """The same lab each time; most rules are at one exposed qube, the worst case for finding conflicts."""
    chance = random.Random(2026)
    lab = create_lab(path)
    names = [f"app-{number}" for number in range(qubes - len(lab.qube_names()))]
    for name in names:
        netvm = QubeName(chance.choice(_NETVMS))
        lab.write_qube(Qube(name=QubeName(name), netvm=netvm, template=QubeName("fedora-42")))
    for number in range(rules):
        name = chance.choice(names)
        is_behind_vpn = lab.qube(name).netvm == "sys-vpn"
        chain = "sys-vpn,sys-firewall,sys-net" if is_behind_vpn else "sys-firewall,sys-net"
        first = _FIRST_PORT + number * ((_LAST_PORT - _FIRST_PORT) // rules)
        last = first + chance.choice((0, 0, 0, 10))
        where = "forwardtype=internal " if is_behind_vpn else chance.choice(("", "", "", "via=personal "))
        sources = f"192.168.0.0/16,10.{number % 250}.0.0/16,fd00::/8"
        lab.set_feature(
            name,
            f"forward.r{number}",
            f"action=forward {where}srcports={first}-{last} srchosts={sources} owner={name} path={chain} "
            f"comment=rule number {number}",
        )
    return lab


def command(lab: LabDirectory, *argv: str, stdin: str = "") -> Spent:
    """Run qvm-forward. Raises `RuntimeError` if it fails."""
    return run("-m", "qubes_fwd_qrexec.admin.views.program", "--lab", str(lab.root), *argv, stdin=stdin)


def run(*argv: str, stdin: str = "") -> Spent:
    """Run python3. Raises `RuntimeError` if it fails."""
    begun, before_s = time.perf_counter(), _children_s()
    done = subprocess.run(
        [sys.executable, *argv], input=stdin.encode(), capture_output=True, timeout=_LIMIT_S, check=False
    )
    found = Spent(time.perf_counter() - begun, _children_s() - before_s)
    if done.returncode != 0:
        raise RuntimeError(f"python3 {' '.join(argv)}: {done.stderr.decode(errors='replace')}")
    return found


def _children_s() -> float:
    """The processor time of all programs that were started here and have ended."""
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
