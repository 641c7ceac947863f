# SPDX-License-Identifier: GPL-2.0-or-later
"""The calls by which dom0 ends tunnels, made: all of them in about the time that one may take.

Others wait behind them, for the lock and for what is to be closed and opened next. So all targets are called
at once, and one that does not answer, or only slowly, is not called for each of its tunnels: what is not
done stays noted in the policy file.
"""

import time
from collections.abc import Callable, Iterable

from qubes_fwd_qrexec.config import REVOKE_SERVICE
from qubes_fwd_qrexec.errors import StoreError
from qubes_fwd_qrexec.values import QubeName

from .backend import Backend, HungError
from .revocations import Revocation

# More targets than run on one machine; the others would wait for these.
_AT_ONCE = 32
# For all calls to one target, beside the last one that is begun. A call takes well under a tenth of a second.
_TURN_S = 5.0

# What became of a call: None if the tunnels are ended.
Result = StoreError | None


class SkippedError(StoreError):
    """A call that was not made, as the target had not answered the one before it in time."""


def revoke(
    revocations: Iterable[Revocation], backend: Backend, elapsed: Callable[[], float] = time.monotonic
) -> dict[Revocation, Result]:
    """Make the calls, and say of each what became of it, in the order of the targets."""
    by_target: dict[QubeName, list[Revocation]] = {}
    for revocation in sorted(revocations):
        by_target.setdefault(revocation.target, []).append(revocation)
    if not by_target:
        return {}
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(_AT_ONCE, len(by_target))) as pool:
        turns = pool.map(lambda turn: _take_turn(turn, backend, elapsed), by_target.values())
        return {revocation: result for turn in turns for revocation, result in turn}


def _take_turn(
    turn: Iterable[Revocation], backend: Backend, elapsed: Callable[[], float]
) -> list[tuple[Revocation, Result]]:
    """The calls to one target, one after the other, for as long as it answers."""
    deadline = elapsed() + _TURN_S
    is_hung = False
    results: list[tuple[Revocation, Result]] = []
    for revocation in turn:
        result: Result = None
        if is_hung or elapsed() > deadline:
            result = SkippedError(f"{revocation.target} was not called for it, as it did not answer in time")
        else:
            try:
                backend.call(revocation.target, f"{REVOKE_SERVICE}+{revocation.argument}")
            except StoreError as error:
                result = error
                is_hung = isinstance(error, HungError)
            except OSError as error:
                result = StoreError(f"{REVOKE_SERVICE} in {revocation.target}: {error}")
        results.append((revocation, result))
    return results
