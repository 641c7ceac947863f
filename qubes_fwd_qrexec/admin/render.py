# SPDX-License-Identifier: GPL-2.0-or-later
"""Plans as text for people: a table where it fits, one block for each rule where it does not.

Text that was stored by others is escaped here, so that no terminal acts on it. It prints nothing.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qubes_fwd_qrexec.rules import BrokenRule

from .expiry import print_expire
from .states import Forward, Plan, State

_COLUMNS = ("QUBE", "NAME", "STATE", "EXPOSED AT", "TARGET", "FROM", "EXPIRES", "COMMENT")
_STATE_COLUMN = 2
# Below this a cell says nothing any more, and blocks are better.
_CELL_MIN = 12
_GAP = "  "
_COLOURS = {
    State.ACTIVE: "32",
    State.WAITING: "36",
    State.SUSPENDED: "33",
    State.EXPIRED: "2",
    State.DISABLED: "2",
    State.REFUSED: "31",
    State.BROKEN: "31",
}


class Style(NamedTuple):
    """How wide the terminal is (None: there is none) and whether it shows colours."""

    width: int | None = None
    has_colour: bool = False

    def state(self, state: State, text: str) -> str:
        return f"\x1b[{_COLOURS[state]}m{text}\x1b[0m" if self.has_colour else text


def escaped(untrusted_text: str) -> str:
    """Printable ASCII as it is, all else as an escape."""
    return "".join(
        c if " " <= c <= "~" else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in untrusted_text
    )


def table(plan: Plan, now: float, style: Style) -> str:
    """All rules of a plan, with the sentence of each that is not simply open below."""
    rows = [_row(forward, now) for forward in plan] + [_broken_row(rule) for rule in plan.broken]
    if not rows:
        return "No forwards.\n"
    states = [forward.state for forward in plan] + [State.BROKEN for _ in plan.broken]
    fitted = _fitted([_COLUMNS, *rows], style.width)
    if fitted is None:
        body = "\n".join(_block(row, state, style) for row, state in zip(rows, states, strict=True))
    else:
        widths = [max(len(row[column]) for row in fitted) for column in range(len(_COLUMNS))]
        lines = [_line(fitted[0], widths, None, style)]
        lines += [_line(row, widths, s, style) for row, s in zip(fitted[1:], states, strict=True)]
        body = "".join(lines)
    remarks = [*_remarks(plan, style)]
    return body + ("\n" + "".join(remarks) if remarks else "")


def _row(forward: Forward, now: float) -> tuple[str, ...]:
    rule = forward.source.rule
    exposed = f"{forward.exposed or '?'}:{rule.listen_ports.brief()}"
    if rule.listen is not None:
        exposed += f" ({rule.listen})"
    return (
        forward.source.target,
        forward.source.name,
        forward.state,
        exposed,
        f"{rule.proto} {rule.target_ports.brief()}",
        str(rule.sources),
        print_expire(rule.expire, now),
        escaped(rule.comment),
    )


def _broken_row(rule: BrokenRule) -> tuple[str, ...]:
    return (rule.target, escaped(rule.name), State.BROKEN, "?", "?", "?", "?", "")


def _fitted(rows: Sequence[tuple[str, ...]], width: int | None) -> list[tuple[str, ...]] | None:
    """The rows with the two free columns cut to fit, or None if that would leave too little of them."""
    fitted = list(rows)
    if width is None:
        return fitted
    # The comment gives way first, then the sources; the whole is in `show`.
    for column in (7, 5):
        widths = [max(len(row[c]) for row in fitted) for c in range(len(_COLUMNS))]
        excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
        if excess > 0:
            room = max(widths[column] - excess, min(_CELL_MIN, widths[column]))
            fitted = [(*row[:column], _cut(row[column], room), *row[column + 1 :]) for row in fitted]
    widths = [max(len(row[c]) for row in fitted) for c in range(len(_COLUMNS))]
    return fitted if sum(widths) + len(_GAP) * (len(widths) - 1) <= width else None


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: max(room - 3, 0)]}..."


def _line(row: tuple[str, ...], widths: Sequence[int], state: State | None, style: Style) -> str:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    cells[-1] = row[-1]
    plain = _GAP.join(cells).rstrip()
    if state is None or not style.has_colour:
        return f"{plain}\n"
    cells[_STATE_COLUMN] = style.state(state, cells[_STATE_COLUMN])
    return f"{_GAP.join(cells).rstrip()}\n"


def _block(row: tuple[str, ...], state: State, style: Style) -> str:
    head = f"{row[0]} {row[1]}: {style.state(state, row[_STATE_COLUMN])}\n"
    labels = zip(_COLUMNS[3:], row[3:], strict=True)
    return head + "".join(f"  {label.lower()} {cell}\n" for label, cell in labels if cell not in ("", "?"))


def _remarks(plan: Plan, style: Style) -> Iterable[str]:
    for forward in plan:
        if forward.state not in (State.ACTIVE, State.DISABLED):
            yield f"{forward.source}: {style.state(forward.state, forward.state)}. {forward.reason}\n"
        for note in forward.notes:
            yield f"{forward.source}: note: {note}\n"
    for rule in plan.broken:
        yield broken_line(rule, style)


def broken_line(rule: BrokenRule, style: Style) -> str:
    """One sentence for what cannot be read as a rule."""
    return (
        f"{rule.target} {escaped(rule.name)}: {style.state(State.BROKEN, State.BROKEN)}. "
        f"{escaped(rule.problem)}. It opens nothing; 'qvm-forward remove' takes it away.\n"
    )


def explained(forward: Forward, style: Style) -> str:
    """A rule's state with all the reasons, over several lines."""
    lines = [f"{forward.source}: {style.state(forward.state, forward.state)}", f"  {forward.reason}"]
    if forward.mode_reason:
        lines.append(f"  mode {forward.mode}: {forward.mode_reason}.")
    if forward.exposed is not None and forward.is_live:
        lines.append(f"  listening at {forward.exposed}: {_exposed_reason(forward)}.")
    if forward.service is not None:
        lines.append(f"  transport {forward.transport} over {forward.service}: {forward.transport_reason}.")
    lines += [f"  note: {note}" for note in forward.notes]
    return "".join(f"{line}\n" for line in lines)


def _exposed_reason(forward: Forward) -> str:
    rule = forward.source.rule
    if rule.via is not None:
        return "the rule names it with via"
    way = " - ".join((forward.source.target, *forward.chain))
    last = "the last of its way out" if rule.forward_type == "external" else "the target's netvm"
    return f"{last}, {way}"
