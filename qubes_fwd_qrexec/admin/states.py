# SPDX-License-Identifier: GPL-2.0-or-later
"""What can become of a rule: its state, the cause, and the planned forward that carries both."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from qubes_fwd_qrexec.common.config import ListenerConfig, Service, Side
from qubes_fwd_qrexec.common.rules import BrokenRule, Mode, NamedRule, Transport
from qubes_fwd_qrexec.common.values import QubeName

from .conflicts import Conflict


class State(StrEnum):
    """The state of a rule, as every listing shows it."""

    ACTIVE = "active"
    WAITING = "waiting"
    SUSPENDED = "suspended"
    EXPIRED = "expired"
    DISABLED = "disabled"
    REFUSED = "refused"
    BROKEN = "broken"
    HELD = "held"


class Cause(StrEnum):
    """Why a rule is in its state: one word for programs, where the sentence is for people."""

    OPEN = "open"
    EXPOSED_HALTED = "exposed-halted"
    TARGET_HALTED = "target-halted"
    CLONED = "cloned"
    NETVM_CHANGED = "netvm-changed"
    EXPIRED = "expired"
    DISABLED = "disabled"
    NO_SUCH_QUBE = "no-such-qube"
    UNREADABLE_QUBE = "unreadable-qube"
    UNFIT_QUBE = "unfit-qube"
    NO_NETVM = "no-netvm"
    NETVM_BROKEN = "netvm-broken"
    NOT_YET = "not-in-this-version"
    NO_SERVICE = "no-service"
    TUNNEL = "tunnel-in-the-path"
    CONFLICT = "conflict"
    TOO_LARGE = "too-large"
    HELD = "held"
    UNREADABLE = "unreadable"


HELD = "Everything is held since 'qvm-forward panic': nothing opens before 'qvm-forward resume'"


class Role(StrEnum):
    """What a qube has to do with a forward."""

    TARGET = "target"
    EXPOSED = "exposed"
    PATH = "path"


class Forward(NamedTuple):
    """One rule with everything that follows from it.

    ``side`` of ``exposed`` is the one by which connections may come.

    ``reason`` is a sentence that says what to do; ``notes`` are labels that every listing repeats, ``hints``
    are said once, when it is made. ``conflict`` is there if another rule has
    its ports, whatever else is the matter. ``ways_out`` are commands, each with its arguments, that a program
    can offer; those of a rule that waits for more than one thing are in their order.
    ``config`` is there exactly when the forward is live; ``exposed`` is also where it would listen.
    """

    source: NamedRule
    state: State
    cause: Cause
    reason: str
    chain: tuple[QubeName, ...] = ()
    mode: Mode = Mode.AUTO
    mode_reason: str = ""
    exposed: QubeName | None = None
    side: Side | None = None
    service: Service | None = None
    transport: Transport = Transport.AUTO
    transport_reason: str = ""
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    config: ListenerConfig | None = None
    conflict: Conflict | None = None
    ways_out: tuple[tuple[str, ...], ...] = ()

    @property
    def is_live(self) -> bool:
        """Whether policy and configuration are given out: now (active) or for the next start (waiting)."""
        return self.state in (State.ACTIVE, State.WAITING)

    def role(self, qube: str) -> Role | None:
        """The part that a qube has in it: as target, as exposed qube, or as another netvm of the target."""
        if qube == self.source.target:
            return Role.TARGET
        if qube == self.exposed:
            return Role.EXPOSED
        return Role.PATH if qube in self.chain else None

    def concerns(self, qube: str) -> bool:
        """Whether a qube has any part in it."""
        return self.role(qube) is not None

    def held(self) -> "Forward":
        """The same while everything is held: not live."""
        if not self.is_live:
            return self
        return self._replace(state=State.HELD, cause=Cause.HELD, reason=f"{HELD}.", config=None)

    def as_json(self) -> dict[str, Any]:
        return {
            "qube": self.source.target,
            "name": self.source.name,
            "state": self.state,
            "cause": self.cause,
            "reason": self.reason,
            "ways_out": [list(command) for command in self.ways_out],
            "mode": self.mode,
            "mode_reason": self.mode_reason,
            "exposed": self.exposed,
            "side": self.side,
            "path": list(self.chain),
            "service": self.service,
            "transport": self.transport,
            "transport_reason": self.transport_reason,
            "notes": list(self.notes),
            "hints": list(self.hints),
            "rule": self.source.rule.options(),
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """All rules in the order of target and name, and what is stored as a rule and cannot be read.

    ``is_held``: nothing of it is live, whatever the rules ask for, until somebody resumes.
    """

    forwards: tuple[Forward, ...]
    broken: tuple[BrokenRule, ...] = ()
    is_held: bool = False

    def __iter__(self) -> Iterator[Forward]:
        return iter(self.forwards)

    @property
    def live(self) -> tuple[Forward, ...]:
        return tuple(forward for forward in self.forwards if forward.is_live)

    def find(self, target: str, name: str) -> Forward | None:
        for forward in self.forwards:
            if forward.source.target == target and forward.source.name == name:
                return forward
        return None
