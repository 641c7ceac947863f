# SPDX-License-Identifier: GPL-2.0-or-later
"""The way of a forward as a small picture in text: clients, exposed qube, the call, target; and its guards.

    +----------------+          +---------+           +----------------+
    | LAN            |  outer   | sys-net |  tunnel   | work           |
    | 192.168.0.0/16 | -------> | port 80 | ========> | 127.0.0.1:8080 |
    +----------------+          +---------+           +----------------+

A terminal that is too narrow for this gets it from top to bottom. It is ASCII everywhere: Python itself sets
UTF-8 where the locale is C (PEP 538), so nothing here can know that box characters would be shown, nor how
wide (East Asian Width: ambiguous). Everything that is drawn was checked or escaped before.
"""

import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.states import Forward, Verdict
from qubes_fwd_qrexec.common.config import Side

from .guards import Guard
from .tables import Colour, Style

# What a terminal has if nothing else is known, and the least that anything is drawn for.
_WIDTH = 80
_WIDTH_MIN = 24
# More networks than these are counted: `show` prints the whole rule below.
_SOURCES_MAX = 4
_MARGIN = "  "
_COLOURS = {Verdict.OK: Colour.GREEN, Verdict.NOTE: Colour.YELLOW, Verdict.STOPS: Colour.RED}


class Link(NamedTuple):
    """What leads from one box to the next; ``label`` says how, or where it is not open what is the matter."""

    label: str
    stroke: str
    is_open: bool


class Picture(NamedTuple):
    """Boxes, each of some lines, and a link between each two of them."""

    boxes: tuple[tuple[str, ...], ...]
    links: tuple[Link, ...]

    def text(self, width: int | None) -> str:
        """From left to right if that fits, else from top to bottom."""
        room = max(_WIDTH if width is None else width, _WIDTH_MIN) - len(_MARGIN)
        lines = self._across()
        if max(map(len, lines)) > room:
            lines = self._down(room)
        return "".join(f"{_MARGIN}{line}".rstrip() + "\n" for line in lines)

    def _across(self) -> list[str]:
        height = max(map(len, self.boxes))
        columns = [_boxed([*box, *[""] * (height - len(box))]) for box in self.boxes]
        parts = [columns[0]]
        for link, column in zip(self.links, columns[1:], strict=True):
            parts += [_arrow_across(link, height), column]
        return ["".join(row) for row in zip(*parts, strict=True)]

    def _down(self, room: int) -> list[str]:
        lines: list[str] = []
        for box, link in zip_longest(self.boxes, self.links):
            lines += _boxed([_cut(line, room - 4) for line in box])
            if link is not None:
                lines += [
                    f"  {_UPRIGHT[link.stroke]} {link.label}".rstrip(),
                    "  v" if link.is_open else "  X",
                ]
        return lines


_UPRIGHT = {"-": "|", "=": "#"}


def of_forward(forward: Forward, found: Sequence[Guard], inventory: Inventory) -> Picture:
    """The way of a forward as it is now, with the verdicts of its guards."""
    rule = forward.source.rule
    exposed, target = inventory.get(forward.exposed or ""), inventory.get(forward.source.target)
    listens = forward.config is not None and exposed is not None and exposed.is_running
    allowed = any(guard.name == "policy" and guard.verdict is not Verdict.STOPS for guard in found)
    answers = target is not None and (target.is_running or rule.autostart)
    boxes = (
        (_clients(forward, inventory), *_networks(forward)),
        (
            str(forward.exposed or "no qube"),
            *([] if rule.listen is None else [str(rule.listen)]),
            rule.listen_ports.worded(),
            *([] if exposed is None or exposed.is_running else ["halted"]),
        ),
        (
            forward.source.target,
            f"127.0.0.1:{rule.target_ports.brief()}",
            *([] if target is None or target.is_running else ["halted"]),
        ),
    )
    call = "" if forward.service is None else str(forward.transport)
    if not forward.is_live:
        call = forward.state
    elif not allowed:
        call = "no policy"
    entrance = Link(str(forward.side or ""), "-", listens)
    return Picture(boxes, (entrance, Link(call, "=", allowed and listens and answers)))


def _clients(forward: Forward, inventory: Inventory) -> str:
    exposed = inventory.get(forward.exposed or "")
    if forward.side is Side.VIFS:
        return "qubes"
    return "LAN" if exposed is not None and exposed.netvm is None and exposed.provides_network else "clients"


def _networks(forward: Forward) -> list[str]:
    sources = forward.source.rule.sources
    if sources.anyone:
        return ["anybody"]
    shown = [str(network) for network in sources.networks[:_SOURCES_MAX]]
    more = len(sources.networks) - len(shown)
    return [*shown, *([f"and {more} more"] if more else [])]


def guards_text(found: Sequence[Guard], style: Style) -> str:
    """The guards below each other, in the width that there is."""
    name_width, verdict_width = max(len(guard.name) for guard in found), max(map(len, Verdict))
    beside = len(_MARGIN) + name_width + verdict_width + 4
    room = max(style.width or _WIDTH, _WIDTH_MIN)
    indent = " " * (beside if room >= 3 * beside else 2 * len(_MARGIN))
    parts = []
    for guard in found:
        verdict = style.colour(_COLOURS[guard.verdict], guard.verdict.ljust(verdict_width))
        lines = textwrap.wrap(
            guard.text, room, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
        head = f"{_MARGIN}{guard.name.ljust(name_width)}  {verdict}"
        if len(indent) == beside:
            lines[0] = f"{head}  {lines[0][beside:]}"
        else:
            lines.insert(0, head.rstrip())
        parts += [f"{line}\n" for line in lines]
    return "".join(parts)


def _arrow_across(link: Link, height: int) -> list[str]:
    """Five lines or more beside a box: the label on the first line of its text, the arrow on the second."""
    length = max(3, len(link.label) + 2)
    arrow = link.stroke * length + ">"
    if not link.is_open:
        arrow = arrow[: length // 2] + "X" + arrow[length // 2 + 1 :]
    blank = " " * (length + 3)
    label = f"  {link.label}".ljust(length + 3)
    return [blank, label, f" {arrow} ", *[blank] * (height - 1)]


def _boxed(lines: Sequence[str]) -> list[str]:
    width = max(map(len, lines))
    edge = f"+{'-' * (width + 2)}+"
    return [edge, *(f"| {line.ljust(width)} |" for line in lines), edge]


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 3]}..."
