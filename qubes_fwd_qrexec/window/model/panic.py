# SPDX-License-Identifier: GPL-2.0-or-later
"""*Close everything*: the process that does it, and what it says, in lines for people.

It is a process of its own, so that it works while a thread of the window waits for the lock or for a qube,
and goes on when the window is closed. It says on stderr what it does, and at its end reports as JSON.
"""

import json
import shlex
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from qubes_fwd_qrexec.admin.apply import Kind, Outcome, Step
from qubes_fwd_qrexec.admin.confirming import Unconfirmed
from qubes_fwd_qrexec.admin.inventory import CONFIG_PREFIX, RULE_PREFIX
from qubes_fwd_qrexec.admin.revoking import Ended
from qubes_fwd_qrexec.admin.views import confirmed, steps
from qubes_fwd_qrexec.admin.views.listeners import GoesOn
from qubes_fwd_qrexec.admin.views.tables import escaped, shortened
from qubes_fwd_qrexec.common.allowance import Allowance
from qubes_fwd_qrexec.common.config import Service
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.values import Proto

from .words import _, ngettext

# With 1,000 forwards a report has some 300 kB.
REPORT_MAX_BYTES = 16 << 20
LINE_MAX_BYTES = 64 << 10
SHOWN_MAX = 2000
"""Characters of a line: GTK takes seconds to lay out one of 100 kB."""
_SAYS = "qvm-forward: "


class Line(NamedTuple):
    """A line of a report; ``is_bad``: something is open, or was not done."""

    text: str
    is_bad: bool = False


class Report(NamedTuple):
    """What became of it. ``is_closed`` only if the process has said so itself, and ended well."""

    is_closed: bool
    title: str
    lines: tuple[Line, ...]


class _Told(NamedTuple):
    """The document that the process printed, as the values that it was made of."""

    is_closed: bool
    is_held: bool
    steps: tuple[Step, ...]
    ended: tuple[Ended, ...]
    not_done: tuple[str, ...]
    notes: tuple[str, ...]
    open_still: tuple[str, ...]
    doubts: tuple[Unconfirmed, ...]
    goes_on: tuple[GoesOn, ...]


def command(lab: str | None = None) -> list[str]:
    """The process to start; ``lab`` is the directory of a lab, None for this Qubes system."""
    # -P, as what lies in the directory where the window was started is none of its modules.
    python = [sys.executable, "-P", "-m", "qubes_fwd_qrexec.admin.views.program"]
    return [*python, *_arguments(lab), "--json", "--verbose"]


def typed(lab: str | None = None) -> str:
    """What a user types to do the same."""
    return shlex.join(["qvm-forward", *_arguments(lab)])


def _arguments(lab: str | None) -> list[str]:
    return ["panic"] if lab is None else ["--lab", lab, "panic"]


class Reading:
    """What the process has said so far, of which only so much is kept as it can mean."""

    def __init__(self, lab: str | None = None) -> None:
        self._lab = lab
        self._out = bytearray()
        self._line = bytearray()

    def said(self, data: bytes) -> list[str]:
        """The lines that are whole, after it wrote ``data`` on stderr; at its end that is nothing, and the
        rest is a line, too.
        """
        *lines, rest = (self._line + data).split(b"\n") if data else (self._line, b"")
        self._line = bytearray(rest[:LINE_MAX_BYTES])
        texts = (line.decode(errors="backslashreplace").removeprefix(_SAYS) for line in lines)
        return [_plain(text) for text in texts if text]

    def reported(self, data: bytes) -> None:
        """It wrote ``data`` on stdout."""
        self._out += data[: REPORT_MAX_BYTES - len(self._out)]

    def ended(self, status: int) -> Report:
        """What became of it. ``status`` is its exit status, or -N where signal N killed it."""
        report = _report(bytes(self._out))
        if report is None or report.is_closed != (status == 0):
            return _unknown(_ending(status), self._lab)
        return report


def not_started(error: OSError, lab: str | None = None) -> Report:
    """The report where the process could not be started."""
    return _unknown(_("It could not be started: {why}.").format(why=error.strerror or error), lab)


def _unknown(why: str, lab: str | None) -> Report:
    lines = [
        why,
        _("What was done until then stands, and it is unknown what is open."),
        _("Try again, or type in a terminal: {command}").format(command=_plain(typed(lab))),
    ]
    title = _("IT IS UNKNOWN WHETHER EVERYTHING IS CLOSED")
    return Report(False, title, tuple(Line(line, is_bad=True) for line in lines))


def _ending(status: int) -> str:
    if status < 0:
        return _("It was killed by signal {number} before it could report.").format(number=-status)
    return _("It ended with status {status}, and its report cannot be read.").format(status=status)


def _report(data: bytes) -> Report | None:
    """What a document says; None if it is none of ours, or not whole."""
    try:
        told = _parse(data)
        lines = tuple(_lines(told))
    except (ForwardError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    title = _("Everything is closed and held") if told.is_closed else _("NOT EVERYTHING IS CLOSED")
    return Report(told.is_closed, title, lines)


def _parse(data: bytes) -> _Told:
    found: dict[str, Any] = json.loads(data)
    if not all(isinstance(found[name], bool) for name in ("is_closed", "is_held")):
        raise TypeError
    return _Told(
        found["is_closed"],
        found["is_held"],
        steps=tuple(map(_step, found["steps"])),
        ended=tuple(Ended(**each) for each in found["ended"]),
        not_done=tuple(found["not_done"]),
        notes=tuple(found["notes"]),
        open_still=tuple(found["open_still"]),
        doubts=tuple(Unconfirmed(**each) for each in found["unconfirmed"]),
        goes_on=tuple(_goes_on(**each) for each in found["goes_on"]),
    )


def _step(data: dict[str, Any]) -> Step:
    kind = Kind(data["step"])
    if kind is Kind.REVOKE:
        told = {qube: Allowance.parse(text.encode()) for qube, text in data["allowances"].items()}
        return Step(kind, allowances=told)
    if kind in (Kind.CLOSE_POLICY, Kind.OPEN_POLICY):
        return Step(kind, lines=(*data["remove"], *data["add"]))
    key = data["feature"].removeprefix(CONFIG_PREFIX).removeprefix(RULE_PREFIX)
    return Step(kind, data.get("value", ""), data["qube"], key, data["was"])


def _goes_on(service: str, proto: str, **more: Any) -> GoesOn:
    return GoesOn(**more, service=Service(service), proto=Proto(proto))


def _plain(text: str) -> str:
    return shortened(escaped(text), SHOWN_MAX)


def _lines(told: _Told) -> Iterator[Line]:
    """What is bad first, then what was done."""
    for text in told.not_done:
        yield Line(_("Not done: {what}").format(what=_plain(text)), is_bad=True)
    doubts = map(confirmed.words, told.doubts)
    for text in (*told.open_still, *map(str, told.goes_on), *doubts):
        yield Line(_("Still open: {what}").format(what=_plain(text)), is_bad=True)
    if not told.is_held:
        yield Line(_("Nothing is held: what is closed may open again."), is_bad=True)
    silent = confirmed.silent(told.doubts, Outcome(told.steps).told)
    for way in confirmed.ways_out(silent):
        yield Line(
            _("To close it even if the qubes of its path do not answer: {command}").format(command=way)
        )
    if targets := sorted({left.target for left in told.goes_on if left.target is not None}):
        way = shlex.join(["qvm-shutdown", *targets])
        yield Line(_("To end these connections at once: {command}").format(command=way))
    for text in told.notes:
        yield Line(_("Note: {text}").format(text=_plain(text)))
    for step in told.steps:
        yield from (Line(_plain(text)) for text in steps.words(step))
    if count := sum(each.ended for each in told.ended):
        qubes = ", ".join(sorted(each.target for each in told.ended if each.ended))
        text = ngettext("Ended {count} call in {qubes}.", "Ended {count} calls in {qubes}.", count)
        yield Line(text.format(count=count, qubes=qubes))
    if told.is_held:
        yield Line(_("The rules are kept as they are, and nothing opens until you resume."))
