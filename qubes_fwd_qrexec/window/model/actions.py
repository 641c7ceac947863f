# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes of the system: each function does what a command of qvm-forward does, and blocks meanwhile.

It returns what that command would print, so the window and the command line say the same. A change of a rule
takes what the user saw of it, and is refused if that is no longer so.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from qubes_fwd_qrexec.admin import changing, hold
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.changing import Changed, System
from qubes_fwd_qrexec.admin.seen import NotAsSeenError, Seen
from qubes_fwd_qrexec.admin.states import Key, Plan
from qubes_fwd_qrexec.admin.views import changes, cli, panic, reasons
from qubes_fwd_qrexec.admin.views.connected import Client
from qubes_fwd_qrexec.admin.views.session import Session
from qubes_fwd_qrexec.admin.views.tables import Style, escaped
from qubes_fwd_qrexec.common.clientreport import WhichClients
from qubes_fwd_qrexec.common.errors import StoredError
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.rules import ForwardRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName

from .words import _


class Done(NamedTuple):
    """What came of a change, as qvm-forward tells it: the lines of its standard output and of its standard
    error, and whether its exit status is 0.
    """

    lines: tuple[str, ...]
    warnings: tuple[str, ...]
    is_well: bool


_Change = Callable[[System], Changed]
_Say = Callable[[Changed, Session], int]


def add(
    backend: Backend, now: float, target: QubeName, rule: ForwardRule, name: RuleName, seen: Seen
) -> Done:
    """Make a forward and open it. Raises what `changing.add` does."""
    make: _Change = partial(changing.add, target=target, rule=rule, name=name)
    return _changed(backend, now, {(target, name): seen}, make, partial(changes.report, done="stored"))


def edit(backend: Backend, now: float, key: Key, options: Sequence[Option], seen: Seen) -> Done:
    """Change options of a rule. Raises what `changing.set_options` does."""
    make: _Change = partial(changing.set_options, which=[key], options=options)
    say: _Say = partial(changes.report, done="changed", was_so="as it was")
    return _changed(backend, now, {key: seen}, make, say)


def extend(backend: Backend, now: float, key: Key, seen: Seen, seconds: int) -> Done:
    """Put off the end of a rule. Raises what `edit` does."""
    return edit(backend, now, key, [Option("expire+", str(seconds), "--extend")], seen)


def enable(backend: Backend, now: float, key: Key, seen: Seen) -> Done:
    """Open what was disabled. Raises what `changing.enable` does."""
    return _switched(backend, now, key, seen, changing.enable, "enabled")


def disable(backend: Backend, now: float, key: Key, seen: Seen) -> Done:
    """Close a forward and keep its rule. Raises what `changing.disable` does."""
    return _switched(backend, now, key, seen, changing.disable, "disabled")


def confirm(backend: Backend, now: float, key: Key, seen: Seen) -> Done:
    """Record owner and path as they are now. Raises what `changing.confirm` does."""
    return _switched(backend, now, key, seen, changing.confirm, "confirmed")


def remove(backend: Backend, now: float, seen: Mapping[Key, Seen]) -> Done:
    """Close forwards and forget their rules, all or none. Raises what `changing.remove` does."""
    return _changed(backend, now, seen, partial(changing.remove, which=seen.keys()), changes.removed)


def apply(backend: Backend, now: float) -> Done:
    """Bring policy and qubes in line with the rules. Raises nothing."""
    return _command(backend, now, "apply")


def resume(backend: Backend, now: float, shown: Plan) -> Done:
    """Lift the hold and open what the user was ``shown``, or less. Raises what `hold.resume` does."""
    return _said(backend, now, lambda session: panic.resumed(*hold.resume(backend, now, shown), session))


def cut(backend: Backend, now: float, key: Key, client: Client | None) -> Done:
    """End connections to a forward, of one client or of all. Raises nothing."""
    report = None if client is None else client.report
    which = [] if report is None else ["--client", str(WhichClients(report.address, report.port))]
    return _command(backend, now, "cut", *key, *which)


def mark(backend: Backend, now: float, qube: str) -> Done:
    """Mark a tunnel qube. Raises nothing."""
    return _command(backend, now, "tunnel", "mark", qube)


def error_lines(error: Exception) -> tuple[str, ...]:
    """What an error says, as on the command line; of a refusal also why, and of a rule that is no longer what
    the user saw, what that was.
    """
    lines = reasons.error_text(error).splitlines()
    if isinstance(error, NotAsSeenError) and error.now.line not in (error.saw.line, None) and error.saw.line:
        lines.append(_("You saw: {line}").format(line=escaped(error.saw.line)))
    return tuple(lines)


def _switched(
    backend: Backend,
    now: float,
    key: Key,
    seen: Seen,
    switch: Callable[[System, list[Key]], Changed],
    done: str,
) -> Done:
    say: _Say = partial(changes.report, done=done, was_so=f"{done} already")
    return _changed(backend, now, {key: seen}, lambda system: switch(system, [key]), say)


def _changed(backend: Backend, now: float, seen: Mapping[Key, Seen], make: _Change, say: _Say) -> Done:
    return _said(backend, now, lambda session: say(make(System(backend, now, seen=seen)), session))


def _said(backend: Backend, now: float, run: Callable[[Session], int]) -> Done:
    """What is said on the way to an exit status. That a change is stored is no error, whatever came then."""
    out, err = io.StringIO(), io.StringIO()
    session = Session(backend, now, {}, io.StringIO(), out, err, Style(), is_json=False, warned=set())
    try:
        status = run(session)
    except StoredError as error:
        first, *more = error_lines(error)
        return Done(_lines(out), (*_lines(err), f"{first[:1].upper()}{first[1:]}", *more), is_well=False)
    return Done(_lines(out), _lines(err), status == 0)


def _command(backend: Backend, now: float, *words: str) -> Done:
    """Run qvm-forward, which says itself what is wrong."""
    out, err = io.StringIO(), io.StringIO()
    status = cli.run(
        words, environ={}, now=now, stdin=io.StringIO(), out=out, err=err, style=Style(), backend=backend
    )
    return Done(_lines(out), _lines(err, f"qvm-forward {words[0]}: "), status == 0)


def _lines(said: io.StringIO, head: str = "") -> tuple[str, ...]:
    """Without the name of the program, which begins each warning, or ``head``, which begins an error."""
    lines = said.getvalue().splitlines()
    return tuple(line.removeprefix(head).removeprefix("qvm-forward: ") for line in lines)
