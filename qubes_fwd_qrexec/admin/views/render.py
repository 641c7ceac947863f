# SPDX-License-Identifier: GPL-2.0-or-later
"""Plans as text for people, as a table and with all the reasons; and as data for programs.

Text that was stored by others is escaped here, so that no terminal acts on it. It prints nothing.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

from qubes_fwd_qrexec.admin.states import Forward, Plan, State
from qubes_fwd_qrexec.common.rules import BrokenRule, Mode, Transport

from . import entrance, reasons, travel
from .tables import Style, Table, escaped
from .times import distance

_TITLES = ("QUBE", "NAME", "STATE", "MODE", "EXPOSED AT", "TARGET", "FROM", "EXPIRES", "COMMENT")
# In a narrow terminal; `show` has the whole. A network of IPv4 has up to 18 characters, most have 14.
_YIELDING = {"COMMENT": 16, "FROM": 14}
_LEAVING = ("MODE", "TARGET", "COMMENT", "ROLE", "EXPIRES")


class Role(StrEnum):
    """What a qube has to do with a forward: it is its target, its exposed qube, by nft a hop between the two,
    or another of its netvms.
    """

    TARGET = "target"
    EXPOSED = "exposed"
    HOP = "hop"
    PATH = "path"


def table(plan: Plan, now: float, style: Style, qubes: Sequence[str] = ()) -> str:
    """All rules of a plan, and below them the sentence of each that is not simply open.

    If it is about some ``qubes``, a column says what each of them has to do with each rule.
    """
    if not (plan.forwards or plan.broken):
        return "No forwards.\n"
    titles: tuple[str, ...] = _TITLES
    rows = [_row(forward, now) for forward in plan]
    rows += [(rule.target, escaped(rule.name), State.BROKEN, *"?????", "") for rule in plan.broken]
    if qubes:
        titles = (*titles[:2], "ROLE", *titles[2:])
        each = [roles_of(forward, qubes) for forward in plan]
        each += [{rule.target: Role.TARGET} for rule in plan.broken]
        is_one = len(qubes) == 1
        roles = [", ".join(r if is_one else f"{q} {r}" for q, r in some.items()) for some in each]
        rows = [(*row[:2], role, *row[2:]) for row, role in zip(rows, roles, strict=True)]
    remarks = "".join(_remarks(plan, style))
    body = Table(titles, rows, _YIELDING, _LEAVING, ("FROM", "EXPOSED AT")).text(style)
    return f"{body}\n{remarks}" if remarks else body


def roles_of(forward: Forward, qubes: Iterable[str]) -> dict[str, Role]:
    """What each of some qubes has to do with a forward, without those that have nothing."""
    parts: dict[str, Role] = dict.fromkeys(forward.chain, Role.PATH)
    parts |= dict.fromkeys(forward.hops, Role.HOP)
    if forward.exposed is not None:
        parts[forward.exposed] = Role.EXPOSED
    parts[forward.named.target] = Role.TARGET
    return {qube: parts[qube] for qube in qubes if qube in parts}


def exposed_at(forward: Forward) -> str:
    """Qube and port, and the address if it is one alone."""
    rule = forward.named.rule
    exposed = f"{forward.exposed or '?'}:{rule.listen_ports.brief()}"
    return exposed if rule.listen is None else f"{exposed} ({rule.listen})"


def _row(forward: Forward, now: float) -> tuple[str, ...]:
    rule = forward.named.rule
    return (
        forward.named.target,
        forward.named.name,
        forward.state,
        forward.mode,
        exposed_at(forward),
        f"{'+'.join(rule.proto.each)} {rule.target_ports.brief()}",
        str(rule.sources),
        "never" if rule.expire is None else distance(rule.expire - now),
        escaped(rule.comment),
    )


def _remarks(plan: Plan, style: Style) -> Iterable[str]:
    for forward in plan:
        # That everything is held is said once, above.
        if forward.state not in (State.ACTIVE, State.DISABLED, State.HELD):
            state = style.state(forward.state, forward.state)
            yield f"{forward.named}: {state}. {reasons.sentence(forward)}\n"
        for note in reasons.notes(forward):
            yield f"{forward.named}: note: {note}\n"
    for rule in plan.broken:
        yield broken_line(rule, style)


def broken_line(rule: BrokenRule, style: Style) -> str:
    """One sentence for what cannot be read as a rule."""
    return (
        f"{rule.target} {escaped(rule.name)}: {style.state(State.BROKEN, State.BROKEN)}. "
        f"{escaped(rule.problem)}. It opens nothing; 'qvm-forward remove' removes it.\n"
    )


def explained(forward: Forward, style: Style) -> str:
    """A rule's state with all the reasons, over several lines."""
    lines = [
        f"{forward.named}: {style.state(forward.state, forward.state)}",
        f"  {reasons.sentence(forward)}",
    ]
    if forward.named.rule.sources.has_names:
        lines.append(f"  sources: {entrance.let_in(forward)}.")
    lines.append(f"  mode {forward.mode}: {travel.mode_reason(forward)}.")
    if forward.exposed is not None and forward.is_live:
        what = "listening" if forward.mode is Mode.QREXEC else "exposed"
        lines.append(f"  {what} at {forward.exposed}: {_exposed_reason(forward)}.")
    if forward.mode is Mode.NFT and forward.is_live:
        lines.append(f"  packets go {' - '.join((*forward.hops, forward.named.target))}.")
    lines += _transports(forward)
    lines += [f"  note: {note}" for note in reasons.notes(forward)]
    if forward.is_live and (note := travel.hides_clients(forward)) is not None:
        lines.append(f"  note: {note}")
    return "".join(f"{line}\n" for line in lines)


def _transports(forward: Forward) -> Iterable[str]:
    """Over what it goes, and why: with single calls each protocol has a line."""
    if forward.service is None:
        return
    services: dict[tuple[Transport, str], list[str]] = {}
    for config in forward.listener_configs:
        why = travel.transport_reason(forward, config.proto)
        services.setdefault((config.transport, why), []).append(config.service)
    if not services:
        services = {(forward.transport, travel.transport_reason(forward)): [forward.service]}
    for (transport, why), each in services.items():
        yield f"  transport {transport} over {' and '.join(each)}: {why}."


def _exposed_reason(forward: Forward) -> str:
    rule = forward.named.rule
    if rule.via is not None:
        return "the rule names it with via"
    way = " - ".join((forward.named.target, *forward.chain))
    last = "the outermost netvm" if rule.forward_type == "external" else "the target's netvm"
    return f"{last}, {way}"


def forward_as_json(forward: Forward) -> dict[str, Any]:
    """One forward. ``ways_out`` are commands with arguments; a word in capitals is to be filled in."""
    return {
        "qube": forward.named.target,
        "name": forward.named.name,
        "state": forward.state,
        "cause": forward.cause,
        "reason": reasons.sentence(forward),
        "ways_out": [list(command) for command in reasons.ways_out(forward)],
        "mode": forward.mode,
        "mode_reason": travel.mode_reason(forward),
        "exposed": forward.exposed,
        "hops": list(forward.hops),
        "side": forward.side,
        "path": list(forward.chain),
        "service": forward.service,
        "transport": forward.transport,
        "transport_reason": "" if forward.service is None else travel.transport_reason(forward),
        "notes": list(reasons.notes(forward)),
        "hints": list(reasons.hints(forward)),
        "sources": [
            {"name": name, "qube": qube, "addresses": [str(network.network_address) for network in addresses]}
            for name, qube, addresses in forward.let_in
        ],
        "rule": forward.named.rule.options(),
    }


def broken_as_json(rule: BrokenRule) -> dict[str, Any]:
    """What is stored as a rule and cannot be read."""
    return {
        "qube": rule.target,
        "name": rule.name,
        "state": State.BROKEN,
        "reason": rule.problem,
        "text": rule.text,
    }


def plan_as_json(planned: Plan) -> dict[str, Any]:
    """All forwards, and what is stored as a rule and cannot be read."""
    return {
        "forwards": [forward_as_json(forward) for forward in planned],
        "broken": [broken_as_json(rule) for rule in planned.broken],
        "is_held": planned.is_held,
    }
