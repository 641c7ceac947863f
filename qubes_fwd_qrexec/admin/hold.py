# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything closed at once and held, whatever is wrong; and the hold lifted again.

The hold is one word in dom0's policy file, which allows nothing while it is there. Every command reads that
file first, and with the hold in it its plan has nothing live. A command that read the file before the hold
cannot open anything after it: it may only replace the text that it read, and no two holds have the same text.
So the file is written at once, without the lock. The targets that it named end their calls next, which in
dom0 needs no qubesd; the rest is done as `apply` does it. If this is killed after its first write, nothing
opens, and the next `apply` closes the rest and ends calls.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from threading import Thread
from typing import NamedTuple, TypeVar

from qubes_fwd_qrexec.common.errors import ForwardError, RefusedError
from qubes_fwd_qrexec.common.values import QubeName

from . import policy, snapshot
from .apply import Applied, reconcile
from .backend import ANY, Backend
from .confirming import Lack, Unconfirmed, end_drains, forwarding, not_closed
from .inventory import CONFIG_PREFIX, Inventory
from .revoking import Ended, allowances, revoke, serving
from .states import Plan

_T = TypeVar("_T")

# A large system is read in some seconds.
QUBES_TIMEOUT_S = 30.0
_WAY_OUT = "on a Qubes system 'systemctl restart qubesd' may help"


class Held(NamedTuple):
    """What a hold has done.

    ``applied`` is None if the qubes could not be read. ``doubts`` are qubes that do not confirm that no
    packets are let through. ``problems`` are errors that left something undone,
    ``notes`` those that did not. ``allowed`` are lines that our own file allows all the same.
    """

    is_held: bool
    applied: Applied | None
    ended: tuple[Ended, ...]
    doubts: tuple[Unconfirmed, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    allowed: tuple[str, ...]


def hold(backend: Backend, now: float, *, qubes_timeout_s: float = QUBES_TIMEOUT_S) -> Held:
    """Close everything and hold it. Never raises a `ForwardError`; waits for the lock for 10 s at most.

    If qubes cannot be read within ``qubes_timeout_s``, listeners stay as they are, and get no call through.
    """
    problems: list[str] = []
    notes: list[str] = []
    before = _tried([], "", backend.read_policy)
    text = policy.hold_text(now)
    _tried(problems, "policy: deny every call", lambda: backend.replace_policy(text, ANY))
    # The holder of the lock may be waiting for a qube, so calls are ended before waiting for the lock; and
    # those that policy names before the qubes are read, as qubesd may hang.
    ended = _end_calls(policy.targets(None if before is None else before.text), backend)
    what = "read all qubes, to find listeners and calls"
    try:
        ended |= _end_calls(serving(_inventory(backend, qubes_timeout_s)) - ended.keys(), backend)
    except TimeoutError:
        problems.append(f"{what}: no answer within {qubes_timeout_s:g} s; {_WAY_OUT}")
        return _held(backend, None, ended, (), problems, notes)
    except (ForwardError, OSError):
        pass  # told below, if it is still so
    with ExitStack() as locked:
        _tried(notes, "this went on without the lock", lambda: locked.enter_context(backend.locked()))
        try:
            applied = _tried(problems, what, lambda: reconcile(backend, now, is_held=True))
        except Exception as error:  # noqa: BLE001  # a rule that is more than we can plan keeps nothing open
            problems.append(f"a bug in qvm-forward: {type(error).__name__}: {error}")
            applied = None
            _take_all(problems, backend)
    doubts: tuple[Unconfirmed, ...] = ()
    if applied is not None:
        doubts = not_closed(forwarding(applied.snapshot.inventory), backend)
        if any(doubt.lack == Lack.DRAINS for doubt in doubts):
            left = _tried(
                problems, "packets: cut the connections that may finish", lambda: end_drains(doubts, backend)
            )
            doubts = doubts if left is None else left
        ended |= {each.target: each for each in applied.outcome.ended}
        problems += applied.outcome.problems
        # Those that could not be found before, or have started since.
        ended |= _end_calls(serving(applied.snapshot.inventory) - ended.keys(), backend)
    return _held(backend, applied, ended, doubts, problems, notes)


def _inventory(backend: Backend, timeout_s: float) -> Inventory:
    """All qubes. Raises `StoreError`, and TimeoutError: qubesadmin waits for qubesd without an end."""
    from concurrent.futures import Future

    found = Future[Inventory]()

    def read() -> None:
        try:
            found.set_result(backend.inventory(with_config=False))
        except BaseException as error:  # noqa: BLE001  # raised by result()
            found.set_exception(error)

    Thread(target=read, daemon=True).start()
    return found.result(timeout_s)


def _held(
    backend: Backend,
    applied: Applied | None,
    ended: dict[QubeName, Ended],
    doubts: tuple[Unconfirmed, ...],
    problems: list[str],
    notes: list[str],
) -> Held:
    """What was done, and what policy says now."""
    installed = _tried(problems, "policy: it cannot be read", backend.read_policy)
    in_force = None if installed is None else installed.text
    allowed = tuple(sorted(policy.allowing(in_force)))
    is_held = policy.is_held(in_force)
    return Held(is_held, applied, tuple(ended.values()), doubts, tuple(problems), tuple(notes), allowed)


def _take_all(problems: list[str], backend: Backend) -> None:
    """Take away all that qubes are told, whatever the rules ask for; a failure at one keeps no other."""
    inventory = _tried(problems, "read all qubes, to remove their configuration", backend.inventory)
    for qube, key, _ in () if inventory is None else inventory.configurations():
        feature = f"{CONFIG_PREFIX}{key}"
        _tried(problems, f"{qube}: remove {feature}", partial(backend.remove_feature, qube, feature))


def _end_calls(targets: Iterable[QubeName], backend: Backend) -> dict[QubeName, Ended]:
    return {each.target: each for each in revoke(allowances(targets, (), cuts_drains=True), backend)}


def _tried(problems: list[str], what: str, do: Callable[[], _T]) -> _T | None:
    """What a step returns; if it fails None, and one problem more."""
    try:
        return do()
    except (ForwardError, OSError) as error:
        problems.append(f"{what}: {error}")
        return None


def resume(backend: Backend, now: float, shown: Plan | None = None) -> tuple[bool, Applied]:
    """Lift the hold and open what the rules ask for; and whether there was a hold. Raises `StoreError`.

    ``shown`` is the plan without the hold that the user has seen. Raises `RefusedError` if any rule would
    open otherwise by now; that it opens less is no reason.
    """
    with backend.locked():
        was_held = policy.is_held(backend.read_policy().text)
        if shown is None:
            return was_held, reconcile(backend, now, is_held=False)
        read = snapshot.look(backend, with_config=True)
        planned = read.plan(now, is_held=False, known=shown)
        if more := _openings(planned) - _openings(shown):
            names = ", ".join(sorted({name for name, _ in more}))
            raise RefusedError(f"nothing was opened: {names} would not open as you were shown")
        return was_held, reconcile(backend, now, is_held=False, read=read, known=planned)


def _openings(planned: Plan) -> set[tuple[str, str]]:
    """The names of the rules that a plan opens, each with a line of policy or what a qube is told."""
    return {
        (f"{forward.named}", line)
        for forward in planned.live
        for line in (*policy.lines(forward), *(f"{q} {config.key} {config}" for q, config in forward.configs))
    }
