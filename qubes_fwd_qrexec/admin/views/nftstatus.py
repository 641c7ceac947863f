# SPDX-License-Identifier: GPL-2.0-or-later
"""How forwards by nft are: whether each qube of the path has them in force, and what it has counted.

All of it is what the qubes say; nothing is decided by it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from qubes_fwd_qrexec.admin import confirming
from qubes_fwd_qrexec.admin.answers import NotRunningError
from qubes_fwd_qrexec.admin.confirming import Answer, Lack, Unconfirmed
from qubes_fwd_qrexec.admin.inventory import CONFIG_PREFIX, Inventory
from qubes_fwd_qrexec.admin.revoking import DRAIN_S
from qubes_fwd_qrexec.admin.states import Forward, Plan, State, Verdict
from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.nftconfig import NftConfig, parse_nft_key
from qubes_fwd_qrexec.common.nftreport import NftReport, PathReport
from qubes_fwd_qrexec.common.rules import Mode
from qubes_fwd_qrexec.common.values import QubeName

from . import confirmed
from .listeners import GoesOn
from .render import Role, exposed_at, forward_as_json, roles_of
from .tables import Check, Style, Table, escaped, size

_TITLES = (
    *("QUBE", "NAME", "STATE", "EXPOSED AT", "THEN", "IN FORCE", "CONNECTIONS", "PACKETS"),
    *("FROM CLIENTS", "TO CLIENTS"),
)
# In a narrow terminal.
_LEAVING = ("THEN", "PACKETS", "FROM CLIENTS", "TO CLIENTS")
# Of what one qube has besides, which may be as much as it likes to say.
_NAMED_MAX = 5


class Standing(StrEnum):
    """How a forward stands at one qube of its path."""

    IN_FORCE = "in-force"
    """The qube says that it has in force what dom0 wants."""
    NOT_IN_FORCE = "not-in-force"
    NO_ANSWER = "no-answer"
    HALTED = "halted"


class Hop(NamedTuple):
    """One qube of a forward's path, the target among them. ``doubt`` is what it does not confirm, and
    ``counted`` what it has counted, if it has the forward at all.
    """

    qube: QubeName
    role: Role
    is_running: bool = True
    doubt: Unconfirmed | None = None
    counted: PathReport | None = None

    @property
    def standing(self) -> Standing:
        if self.doubt is None:
            return Standing.IN_FORCE if self.is_running else Standing.HALTED
        return Standing.NO_ANSWER if self.doubt.lack == Lack.NO_ANSWER else Standing.NOT_IN_FORCE

    @property
    def reason(self) -> str | None:
        """Why the forward is not known to be in force there; None if it is."""
        if self.doubt is not None:
            return confirmed.lack(self.doubt)
        return None if self.is_running else f"{self.qube} is halted"

    def as_json(self) -> dict[str, Any]:
        cause = None if self.doubt is None else self.doubt.lack
        told = {"qube": self.qube, "role": self.role, "state": self.standing}
        return {**told, "cause": cause, "reason": self.reason, "figures": figures(self)}


def figures(hop: Hop) -> dict[str, Any]:
    """What a qube has counted since the forward is in force there; a target counts no bytes to clients."""
    counted = hop.counted
    if counted is None:
        return {"is_known": False, "reason": hop.reason}
    return {
        "is_known": True,
        "total": counted.connections,
        "packets": counted.packets,
        "sent": counted.sent,
        "received": None if hop.role is Role.TARGET else counted.received,
    }


class NftRow(NamedTuple):
    """One live forward by nft, and the qubes of its path, the exposed qube first."""

    forward: Forward
    hops: tuple[Hop, ...]

    @property
    def state(self) -> State:
        is_out = any(hop.standing is Standing.NOT_IN_FORCE for hop in self.hops)
        return State.WAITING if is_out else self.forward.state

    @property
    def reason(self) -> str | None:
        """What keeps packets from going the whole path, as far as its qubes say."""
        out = [hop for hop in self.hops if hop.standing in (Standing.NOT_IN_FORCE, Standing.HALTED)]
        return "; ".join(hop.reason for hop in out if hop.reason is not None) or None

    @property
    def is_least(self) -> bool:
        """Whether the exposed qube may forward packets of open connections without counting them.

        Stock netvms offload what goes from a qube to their own netvm, so not at a network card or a VPN.
        """
        return self.forward.side is Side.UPLINK

    def as_json(self) -> dict[str, Any]:
        waiting: dict[str, Any] = {}
        if self.state is not self.forward.state:
            out = next(hop.doubt for hop in self.hops if hop.standing is Standing.NOT_IN_FORCE)
            waiting = {"state": self.state, "cause": out and out.lack, "reason": self.reason}
        return {
            **forward_as_json(self.forward),
            **waiting,
            "proto": self.forward.named.rule.proto,
            "ports": self.forward.named.rule.listen_ports.brief(),
            "is_allowed": True,
            "policy": "",
            "figures": figures(self.hops[0]) | {"is_least": self.is_least},
            "answers": [hop.as_json() for hop in self.hops],
        }


class NftStatus(NamedTuple):
    """All live forwards by nft, and what qubes have in force besides.

    ``leftovers`` are in force though no rule asks for them and nothing tells the qube to, ``draining`` are
    connections that may go on for some time. ``problems`` are what firewalls say is wrong with them.
    ``silent`` are the qubes that gave no answer.
    """

    rows: tuple[NftRow, ...]
    leftovers: tuple[Unconfirmed, ...]
    draining: tuple[GoesOn, ...]
    problems: Mapping[QubeName, str]
    silent: Mapping[QubeName, str]

    @property
    def is_well(self) -> bool:
        """Whether nothing is known to be other than the rules ask for; silence is no fault."""
        return not (
            self.leftovers or self.problems or any(row.state is not row.forward.state for row in self.rows)
        )

    def table(self, style: Style) -> str:
        return Table(_TITLES, [*map(_cells, self.rows)], {}, _LEAVING, ("EXPOSED AT",)).text(style)

    def left(self) -> Iterator[str]:
        """A sentence for each qube that has in force what it should not."""
        for qube in dict.fromkeys(doubt.qube for doubt in self.leftovers):
            keys = [parse_nft_key(doubt.key) for doubt in self.leftovers if doubt.qube == qube]
            names = ", ".join(f"{target} {name}" for target, name in keys[:_NAMED_MAX])
            more = f" and {len(keys) - _NAMED_MAX} more" if len(keys) > _NAMED_MAX else ""
            yield (
                f"No rule asks for this: {qube} still forwards {names}{more} by nft; restart {qube}, or "
                f"cut off the target with 'qvm-prefs {keys[0][0]} netvm '''."
            )

    def remarks(self) -> Iterator[str]:
        """What is not as it should be, or not known, in a sentence each."""
        for row in self.rows:
            name = row.forward.named
            if row.reason is not None:
                helps = f"'qvm-forward diagnose {name}' says what helps"
                yield f"{name} is {State.WAITING}: {row.reason}; {helps}."
        for qube, text in self.problems.items():
            yield f"{qube}: its firewall for forwards by nft is not as it should be: {escaped(text)}."
        if self.silent:
            why = "; ".join(dict.fromkeys(map(escaped, self.silent.values())))
            yield f"What is forwarded by nft at {', '.join(self.silent)} is unknown: {why}."
        least = {str(row.forward.exposed): None for row in self.rows if row.is_least and row.hops[0].counted}
        if least:
            yield (
                f"{', '.join(least)} may have passed on more packets and bytes: while a flowtable "
                "speeds up a connection, its packets are not counted."
            )


def to_ask(planned: Plan, inventory: Inventory, qubes: Collection[str] = ()) -> list[QubeName]:
    """The running qubes whose answers `nft_status` wants for a part of the plan: those of the paths, and
    those of ``qubes``, or any, that may have something in force.
    """
    paths = {qube for forward in planned.live for qube, _ in forward.nft_configs}
    may_have = {qube for qube in confirming.forwarding(inventory) if not qubes or qube in qubes}
    return sorted(may_have | {qube for qube in paths if inventory.qubes[qube].is_running})


def nft_status(
    planned: Plan, everything: Plan, inventory: Inventory, answers: Mapping[QubeName, Answer], now: float
) -> NftStatus:
    """How forwards by nft are, by these answers; ``planned`` is the part of the plan that is shown."""
    wanted = {(qube, config.key) for forward in everything.live for qube, config in forward.nft_configs}
    leftovers: list[Unconfirmed] = []
    draining: dict[str, GoesOn] = {}
    problems: dict[QubeName, str] = {}
    silent: dict[QubeName, str] = {}
    for qube, answer in answers.items():
        if not isinstance(answer, NftReport):
            if answer.status != ExitStatus.NO_SERVICE:
                silent[qube] = str(answer)
            continue
        if answer.problem is not None:
            problems[qube] = answer.problem
        for report in answer.forwards:
            if (qube, report.key) in wanted:
                continue
            is_told = f"{CONFIG_PREFIX}{report.key}" in inventory.qubes[qube].features
            if report.draining:
                draining.setdefault(report.key, _draining(qube, report.key, everything, now))
            elif report.digest is not None and not is_told:  # else applying takes it away
                leftovers.append(Unconfirmed(qube, report.key, Lack.STILL_IN_FORCE, is_opening=False))
    rows = tuple(NftRow(f, hops(f, answers)) for f in planned.live if f.mode is Mode.NFT)
    return NftStatus(rows, tuple(leftovers), tuple(draining.values()), problems, silent)


def _draining(qube: QubeName, key: str, everything: Plan, now: float) -> GoesOn:
    """Connections that a qube lets go on, for as long as the rule says, or at most."""
    target, name = parse_nft_key(key)
    forward = everything.find(target, name)
    if forward is None:
        return GoesOn(target, name, qube, None, DRAIN_S)
    rule = forward.named.rule
    left_s = DRAIN_S if rule.expire is None else min(DRAIN_S, max(0, int(rule.expire + DRAIN_S - now)))
    return GoesOn(target, name, qube, None, left_s, proto=rule.proto)


def hops(forward: Forward, answers: Mapping[QubeName, Answer]) -> tuple[Hop, ...]:
    """What the qubes of a forward's path say, the exposed qube first; one that was not asked is halted."""
    roles = roles_of(forward, [qube for qube, _ in forward.nft_configs])
    return tuple(
        _hop(qube, roles[qube], config, answers.get(qube)) for qube, config in reversed(forward.nft_configs)
    )


def _hop(qube: QubeName, role: Role, config: NftConfig, answer: Answer | None) -> Hop:
    if answer is None:
        return Hop(qube, role, is_running=False)
    if isinstance(answer, NotRunningError):  # it was running just now
        return Hop(qube, role, doubt=Unconfirmed(qube, config.key, Lack.NO_ANSWER, True, str(answer)))
    counted = answer.find(config.key) if isinstance(answer, NftReport) else None
    return Hop(qube, role, doubt=confirming.judged(qube, config.key, config, answer), counted=counted)


def said(path: Sequence[Hop]) -> dict[QubeName, str]:
    """How a forward stands at each qube that does not say that it is in force, for `picture`."""
    return {hop.qube: hop.standing.replace("-", " ") for hop in path if hop.standing is not Standing.IN_FORCE}


def checks(path: Sequence[Hop]) -> Iterator[Check]:
    """What the qubes of a path say, those that say the same together."""
    at: dict[Standing, list[Hop]] = {}
    for hop in path:
        at.setdefault(hop.standing, []).append(hop)
    for standing, some in at.items():
        qubes = ", ".join(hop.qube for hop in some)
        if standing is Standing.IN_FORCE:
            yield Check("in force", Verdict.OK, f"at {qubes}")
        elif standing is Standing.NO_ANSWER:
            yield Check("in force", "unknown", f"at {qubes}: {some[0].reason}")
        else:
            why = "; ".join(str(hop.reason) for hop in some)
            yield Check("in force", Verdict.STOPS if standing is Standing.NOT_IN_FORCE else Verdict.NOTE, why)


def _cells(row: NftRow) -> tuple[str, ...]:
    named, counted = row.forward.named, row.hops[0].counted
    then = " - ".join(hop.qube for hop in row.hops[1:])
    in_force = sum(hop.standing is Standing.IN_FORCE for hop in row.hops)
    words = (
        named.target,
        named.name,
        row.state,
        exposed_at(row.forward),
        then,
        f"{in_force} of {len(row.hops)}",
    )
    if counted is None:
        return (*words, *("unknown",) * 4)
    numbers = (str(counted.connections), str(counted.packets))
    return (*words, *numbers, size(counted.sent), size(counted.received))
