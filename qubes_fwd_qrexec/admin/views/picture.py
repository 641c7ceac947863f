# SPDX-License-Identifier: GPL-2.0-or-later
"""The way of a forward as a small picture in text: clients, exposed qube, the call, target.

    +----------------+          +---------+        +----------------+
    | LAN            |  outer   | sys-net |  mux   | work           |
    | 192.168.0.0/16 | -------> | port 80 | =====> | 127.0.0.1:8080 |
    +----------------+          +---------+        +----------------+

By nft there is a box for each qube that packets go through. Where the terminal is too narrow for it, the same
goes from top to bottom. It is ASCII everywhere: Python sets UTF-8 itself where the locale is C (PEP 538), so
nothing here can know whether box characters would be shown. Everything that is drawn was checked or escaped
before.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.states import Forward
from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.rules import Mode
from qubes_fwd_qrexec.common.values import QubeName

from . import carried
from .entrance import asked, is_local
from .tables import shortened

# The width if no terminal says another, and the least that anything is drawn for.
_WIDTH = 80
_WIDTH_MIN = 24
# Further networks are counted: `show` prints the whole rule below.
_SOURCES_MAX = 4
_MARGIN = "  "
# What a qube's box says last where nothing gets through.
_HALTED, _OUT = "halted", "not in force"


class _Link(NamedTuple):
    """What leads from one box to the next; ``label`` says how, or why it is not open."""

    label: str
    stroke: str
    is_open: bool


def picture(
    forward: Forward,
    inventory: Inventory,
    *,
    is_allowed: bool,
    said: Mapping[QubeName, str] = MappingProxyType({}),
    width: int | None = None,
) -> str:
    """The way of a forward as it is now; ``is_allowed``: whether dom0's policy allows its calls, and
    ``said`` how the forward stands at each qube of a path by nft that does not say that it is in force.
    """
    rule = forward.named.rule
    by_nft = forward.mode is Mode.NFT
    server = rule.target_ports.worded() if by_nft else f"127.0.0.1:{rule.target_ports.brief()}"
    entered = [] if rule.listen is None else [str(rule.listen)]
    entered.append(f"{carried.named(rule.proto)}{rule.listen_ports.worded()}")
    way = [(forward.exposed, entered), *((hop, entered[-1:]) for hop in forward.hops[1:])]
    boxes = [(_clients(forward, inventory), *_networks(forward))]
    for name, texts in (*way, (forward.named.target, [server])):
        qube = inventory.get(name or "")
        is_halted = qube is not None and not qube.is_running
        state = _HALTED if is_halted else said.get(name or QubeName(""), "")
        boxes.append((str(name or "no qube"), *texts, *([state] if state else [])))
    exposed, target = inventory.get(forward.exposed or ""), inventory.get(forward.named.target)
    listens = forward.is_live and exposed is not None and exposed.is_running and boxes[1][-1] != _OUT
    first = _Link("loopback" if is_local(forward) else str(forward.side or ""), "-", listens)
    if by_nft:
        label = "nft" if forward.is_live else str(forward.state)
        links = [
            _Link(label, "-", forward.is_live and texts[-1] not in (_OUT, _HALTED)) for texts in boxes[2:]
        ]
    else:
        answers = target is not None and (target.is_running or rule.autostart)
        call = "no policy" if forward.is_live and not is_allowed else str(forward.transport)
        label = call if forward.is_live else str(forward.state)
        links = [_Link(label, "=", is_allowed and listens and answers)]
    links.insert(0, first)
    room = max(width or _WIDTH, _WIDTH_MIN) - len(_MARGIN)
    lines = _across(boxes, links)
    if len(lines[0]) > room:
        lines = [shortened(line, room) for line in _down(boxes, links)]
    return "".join(f"{_MARGIN}{line}\n" for line in lines)


def _across(boxes: Sequence[Sequence[str]], links: Sequence[_Link]) -> list[str]:
    rows = [""] * (max(map(len, boxes)) + 2)
    for number, box in enumerate(boxes):
        if number:
            link = links[number - 1]
            arrow = link.stroke * max(3, len(link.label) + 2) + ">"
            if not link.is_open:
                middle = (len(arrow) - 1) // 2
                arrow = f"{arrow[:middle]}X{arrow[middle + 1 :]}"
            beside = ["", f"  {link.label}", f" {arrow} ", *[""] * len(rows)]
            rows = [row + text.ljust(len(arrow) + 2) for row, text in zip(rows, beside, strict=False)]
        width = max(map(len, box))
        edge = f"+{'-' * (width + 2)}+"
        texts = [*box, *[""] * (len(rows) - 2 - len(box))]
        column = [edge, *(f"| {text.ljust(width)} |" for text in texts), edge]
        rows = [row + cell for row, cell in zip(rows, column, strict=True)]
    return rows


def _down(boxes: Sequence[Sequence[str]], links: Sequence[_Link]) -> list[str]:
    lines = [", ".join(boxes[0])]
    for link, box in zip(links, boxes[1:], strict=True):
        upright = {"-": "|", "=": "#"}[link.stroke]
        lines += [f"  {upright} {link.label}".rstrip(), "  v" if link.is_open else "  X", ", ".join(box)]
    return lines


def _clients(forward: Forward, inventory: Inventory) -> str:
    exposed = inventory.get(forward.exposed or "")
    if exposed is not None and is_local(forward):
        return exposed.name
    if forward.side is Side.VIFS:
        return "qubes"
    return "LAN" if exposed is not None and exposed.netvm is None and exposed.provides_network else "clients"


def _networks(forward: Forward) -> list[str]:
    if forward.named.rule.sources.anyone:
        return ["anybody"]
    names = asked(forward.named.rule)
    more = len(names) - _SOURCES_MAX
    return [*names[:_SOURCES_MAX], *([f"and {more} more"] if more > 0 else [])]
