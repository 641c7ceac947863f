# SPDX-License-Identifier: GPL-2.0-or-later
"""The way of a forward as a small picture in text: clients, exposed qube, the call, target.

    +----------------+          +---------+        +----------------+
    | LAN            |  outer   | sys-net |  mux   | work           |
    | 192.168.0.0/16 | -------> | port 80 | =====> | 127.0.0.1:8080 |
    +----------------+          +---------+        +----------------+

Where the terminal is too narrow for it, the same goes from top to bottom. It is ASCII everywhere: Python sets
UTF-8 itself where the locale is C (PEP 538), so nothing here can know whether box characters would be shown.
Everything that is drawn was checked or escaped before.
"""

from collections.abc import Sequence
from typing import NamedTuple

from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.states import Forward
from qubes_fwd_qrexec.common.config import Side

from .reasons import asked, is_local
from .tables import cut

# The width if no terminal says another, and the least that anything is drawn for.
_WIDTH = 80
_WIDTH_MIN = 24
# Further networks are counted: `show` prints the whole rule below.
_SOURCES_MAX = 4
_MARGIN = "  "


class _Link(NamedTuple):
    """What leads from one box to the next; ``label`` says how, or why it is not open."""

    label: str
    stroke: str
    is_open: bool


def picture(forward: Forward, inventory: Inventory, *, is_allowed: bool, width: int | None = None) -> str:
    """The way of a forward as it is now; ``is_allowed``: whether dom0's policy allows its calls."""
    rule = forward.named.rule
    exposed, target = inventory.get(forward.exposed or ""), inventory.get(forward.named.target)
    boxes = (
        (_clients(forward, inventory), *_networks(forward)),
        (
            str(forward.exposed or "no qube"),
            *([] if rule.listen is None else [str(rule.listen)]),
            rule.listen_ports.worded(),
            *([] if exposed is None or exposed.is_running else ["halted"]),
        ),
        (
            forward.named.target,
            f"127.0.0.1:{rule.target_ports.brief()}",
            *([] if target is None or target.is_running else ["halted"]),
        ),
    )
    listens = forward.is_live and exposed is not None and exposed.is_running
    answers = target is not None and (target.is_running or rule.autostart)
    call = "no policy" if forward.is_live and not is_allowed else str(forward.transport)
    links = (
        _Link("loopback" if is_local(forward) else str(forward.side or ""), "-", listens),
        _Link(call if forward.is_live else forward.state, "=", is_allowed and listens and answers),
    )
    room = max(width or _WIDTH, _WIDTH_MIN) - len(_MARGIN)
    lines = _across(boxes, links)
    if len(lines[0]) > room:
        lines = [cut(line, room) for line in _down(boxes, links)]
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
