# SPDX-License-Identifier: GPL-2.0-or-later
"""How long it takes until 100 forwards by nft are in force: in sys-net, and before that in dom0."""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.firewall.nfttool import Nft
from qubes_fwd_qrexec.firewall.pathrules import Kept
from qubes_fwd_qrexec.firewall.wanted import Firewall, Wanted
from qubes_fwd_qrexec.lab.blueprint import create_lab

from .adminlab import command
from .effort import Effort
from .lines import Line, Result, Staged, each, turns
from .road import NET, PATH
from .ways import PORT, ByNft, Recipe, Way, in_force, recipe, told

_RULES = 100
_PORTS = range(10_000, 10_000 + _RULES)
_ROUNDS = 7


def apply(stage: Staged, effort: Effort) -> Result:
    """100 forwards where there were none, then one more.

    By hand that is a file for nft, of IPv4 alone; ours looks at the firewall, compares, and does both
    families. dom0 writes what each qube is told; its qubes are a lab's and do not run, so none is asked.
    """
    titles = {
        "first": f"sys-net: {_RULES} forwards put in force",
        "more": f"  one more beside {_RULES}",
        "same": "  nothing to change",
        "dom0": f"dom0: qvm-forward apply with {_RULES} new forwards",
        "dom0-more": f"  one more beside {_RULES}",
    }
    samples: dict[str, dict[str, list[float]]] = {key: defaultdict(list) for key in titles}
    for way in turns([way for way in stage.peers if isinstance(way, Recipe | ByNft)], _ROUNDS):
        with way.road.within(NET):
            found = _by_hand(way) if isinstance(way, Recipe) else _by_program()
        if isinstance(way, ByNft):
            found |= _in_dom0()
        for key, seconds in found.items():
            samples[key][way.name].append(1000 * seconds)
    lines = [
        Line(key, title, "ms", values=each(samples[key], statistics.median)) for key, title in titles.items()
    ]
    return Result(f"{_ROUNDS} x each", lines)


def _by_hand(way: Way) -> dict[str, float]:
    nft, last = Nft(), _PORTS[-1] + 1
    text = "".join(recipe(NET, port, port) for port in _PORTS)
    found = {
        "first": _seconds(lambda: nft.carry_out(text)),
        "more": _seconds(lambda: nft.carry_out(recipe(NET, last, last))),
    }
    way.road.wires.reload_firewall(NET)
    way.open()
    return found


def _by_program() -> dict[str, float]:
    kept = in_force()
    always = tuple(Kept(told(proto, PORT)[NET]) for proto in Proto.BOTH.each)
    many = (*always, *(Kept(told(Proto.TCP, port)[NET]) for port in _PORTS))
    more = (*many, Kept(told(Proto.TCP, _PORTS[-1] + 1)[NET]))
    found = {
        "first": _seconds(lambda: kept.put(Wanted(paths=many))),
        "more": _seconds(lambda: kept.put(Wanted(paths=more))),
        "same": _seconds(lambda: kept.put(Wanted(paths=more))),
    }
    Firewall(Nft()).keep(Wanted(paths=always))
    return found


def _in_dom0() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="fwd-bench-") as place:
        lab = create_lab(Path(place, "lab"))
        for qube in PATH:
            lab.set_feature(qube, "service.qubes-forward-nft", "1")

        def add(port: int) -> None:
            options = f"mode=nft srcports={port}-{port} srchosts=192.168.77.0/24 owner=work"
            lab.set_feature("work", f"forward.n{port}", f"action=forward {options} path=sys-firewall,sys-net")

        for port in _PORTS:
            add(port)
        found = {"dom0": command(lab, "apply").seconds}
        add(_PORTS[-1] + 1)
        return found | {"dom0-more": command(lab, "apply").seconds}


def _seconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun
