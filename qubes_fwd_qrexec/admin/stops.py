# SPDX-License-Identifier: GPL-2.0-or-later
"""What stops a rule: its state, the cause, a sentence, and the commands that are a way out."""

from qubes_fwd_qrexec.common.rules import NamedRule

from .states import Cause, State


class Stop(Exception):  # noqa: N818  # it ends the judgement of one rule and is no error
    """The judgement of a rule is over: it is not live. ``ways_out`` are commands with their arguments."""

    def __init__(self, state: State, cause: Cause, reason: str, *ways_out: tuple[str, ...]) -> None:
        super().__init__(reason)
        self.state = state
        self.cause = cause
        self.reason = reason
        self.ways_out = ways_out


def refused(cause: Cause, reason: str, *ways_out: tuple[str, ...]) -> Stop:
    """A rule that cannot be open, to be raised."""
    return Stop(State.REFUSED, cause, reason, *ways_out)


def command(verb: str, named: NamedRule, *more: str) -> tuple[str, ...]:
    """A command of qvm-forward about a rule."""
    return ("qvm-forward", verb, named.target, named.name, *more)
