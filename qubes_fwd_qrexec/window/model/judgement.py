# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of a draft: whether it may be stored, what it opens then, what is wrong in which field, and
what would mend it.

The same code as for the command line decides; here it is only asked.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from qubes_fwd_qrexec.admin.changing import changed_rule, new_rule
from qubes_fwd_qrexec.admin.seen import Seen
from qubes_fwd_qrexec.admin.snapshot import Snapshot, parse_new_name
from qubes_fwd_qrexec.admin.states import Cause, Finding, Forward, Key, Plan, State
from qubes_fwd_qrexec.admin.views import changes, reasons, travel
from qubes_fwd_qrexec.admin.views.tables import escaped
from qubes_fwd_qrexec.admin.views.times import print_expire
from qubes_fwd_qrexec.common.errors import RefusedError, RuleError, TextError
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.rules import BrokenRule, ForwardRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName

from .draft import ANYBODY, NAME, QUBE, Draft
from .mends import Mend, of_contradiction, of_ways_out
from .preview import Preview, preview
from .words import _

NOTHING: Mapping[str, str] = MappingProxyType({})
# The fields that a refusal is about; of those that it may be about several, the first.
_BLAMED: Mapping[Cause | tuple[Cause, str], str] = {
    (Cause.NO_SUCH_QUBE, "exposed"): "via",
    (Cause.UNFIT_QUBE, "target"): QUBE,
    (Cause.UNFIT_QUBE, "exposed"): "via",
    (Cause.UNFIT_QUBE, "itself"): "via",
    Cause.NETVM_BROKEN: QUBE,
    Cause.NO_NETVM: "forwardtype",
    Cause.TUNNEL: "forwardtype",
    Cause.NO_IP_PATH: "via",
    Cause.NFT_BEHIND_TUNNEL: "mode",
    Cause.NO_NFT_SERVICE: "mode",
    Cause.NFT_SWITCHED_OFF: "mode",
    Cause.NFT_AT_WHONIX: "mode",
    Cause.NO_ADDRESS: "srchosts",
    Cause.LINK_LOCAL: "srchosts",
    Cause.NFT_LOOPBACK: "listen",
    (Cause.NO_SERVICE, "system"): QUBE,
    (Cause.NO_SERVICE, "udp-system"): QUBE,
    (Cause.NO_SERVICE, "udp"): "proto",
    (Cause.NO_SERVICE, "transport=mux"): "transport",
    (Cause.NO_SERVICE, "proxy"): "proxy",
    (Cause.CONFLICT, "port"): "srcports",
    (Cause.CONFLICT, "own-port"): "dstports",
    (Cause.CONFLICT, "autostart"): "autostart",
    (Cause.TOO_LARGE, "ports"): "srcports",
    (Cause.TOO_LARGE, "shifted"): "srcports",
    (Cause.TOO_LARGE, "bytes"): "srchosts",
    Cause.SOURCE_ELSEWHERE: "srchosts",
    Cause.NO_SOURCE: "srchosts",
}


class Judgement(NamedTuple):
    """What becomes of ``draft``. It ``is_fine`` if it may be stored; ``button`` is the word for that.

    ``faults`` are texts by field, ``missing`` the fields to be filled first. ``named`` is what would be
    stored at the time ``now``, and ``forward`` what the plan makes of it; ``seen`` is what this is based on.
    ``headline`` sums it up, ``lines`` and ``notes`` explain, ``mends`` would help.
    """

    draft: Draft
    button: str
    headline: str
    lines: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    faults: Mapping[str, str] = NOTHING
    missing: tuple[str, ...] = ()
    mends: tuple[Mend, ...] = ()
    named: NamedRule | None = None
    forward: Forward | None = None
    seen: Seen | None = None
    is_fine: bool = False
    now: float = 0.0

    @property
    def asks_bypass(self) -> bool:
        """Whether a tunnel is bypassed, or would be."""
        causes = (Cause.TUNNEL, Cause.BYPASSES_TUNNEL, Cause.NFT_BEHIND_TUNNEL)
        return self.forward is not None and any(map(self.forward.finding, causes))


def judge(draft: Draft, snapshot: Snapshot, now: float, known: Plan | None = None) -> Judgement:
    """What becomes of a draft in a system at ``now``, in UNIX seconds. ``known`` is the plan of the snapshot,
    where the caller has it.
    """
    if draft.base is not None and snapshot.stored.get(draft.base.key) != draft.base:
        return _overtaken(draft, draft.base, snapshot)
    faults, mends = _faults(draft, snapshot, now)
    missing = draft.missing
    if faults or missing:
        headline = _("Something is not right yet.") if faults else _("Something still has to be filled in.")
        return Judgement(draft, button(draft), headline, faults=faults, missing=missing, mends=mends)
    try:
        named = _named(draft, snapshot, now)
    except RuleError as error:
        faults = {field_of(draft, name): error.problem for name in error.options}
        return Judgement(draft, button(draft), _("Something is not right yet."), faults=faults)
    if draft.base is not None and named == draft.base:
        return Judgement(draft, button(draft), _("Nothing has been changed yet."), named=named)
    return _previewed(draft, named, snapshot, preview(snapshot, now, named, known), now)


def button(draft: Draft, forward: Forward | None = None) -> str:
    """The word for storing a draft, with a mnemonic. ``forward`` is what would become of it, where known."""
    is_asleep = draft.base is not None and not draft.base.rule.enabled
    is_asleep |= forward is not None and forward.state in (State.DISABLED, State.EXPIRED)
    is_anybody = draft.is_anybody and not is_asleep
    if draft.base is None and (forward is None or forward.is_live):
        return _("_Open to anybody") if is_anybody else _("_Open")
    return _("_Save: open to anybody") if is_anybody else _("_Save")


def _overtaken(draft: Draft, base: NamedRule, snapshot: Snapshot) -> Judgement:
    stored, lines = snapshot.stored.get(base.key), [_("You saw: {rule}").format(rule=base.rule)]
    headline, mends = (
        _("This rule has been removed in the meantime."),
        [Mend(_("Create it again"), draft=draft.rebased(None))],
    )
    if stored is not None:
        text = stored.text if isinstance(stored, BrokenRule) else str(stored.rule)
        headline = _("This rule has been changed in the meantime.")
        lines.append(_("It is now: {rule}").format(rule=escaped(text)))
    if isinstance(stored, NamedRule):
        take = Mend(_("Use what is stored now"), draft=Draft.of(stored))
        mends = [take, Mend(_("Keep what I entered"), draft=draft.rebased(stored))]
    elif stored is not None:
        mends = []
    return Judgement(draft, button(draft), headline, lines=tuple(lines), mends=tuple(mends))


def field_of(draft: Draft, option: str) -> str:
    """The field that shows an option: the exposed ports are those of the server if none are given."""
    return "dstports" if option == "srcports" and not draft.exposed_ports.strip() else option


def _faults(draft: Draft, snapshot: Snapshot, now: float) -> tuple[dict[str, str], tuple[Mend, ...]]:
    """What is wrong with the fields by themselves, and what may mend that."""
    found, mends = dict(_own_faults(draft, snapshot)), list[Mend]()
    try:
        given = draft.options(now)
    except RuleError as error:
        if "expire" not in draft.missing:
            found["expire"] = error.problem
        given = draft.with_options([Option("expire", "", "")]).options(now)
    texts = {} if draft.base is None else draft.base.rule.options()
    texts |= {option.name: option.value for option in given}
    for fault in ForwardRule.faults(Option(name, text, name) for name, text in texts.items() if text):
        fields = [field_of(draft, name) for name in fault.options]
        found = {field: fault.problem for field in fields if field not in draft.missing} | found
        mends += of_contradiction(fault.options)
    return found, tuple(mends)


def _own_faults(draft: Draft, snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    """What only a form, or only a system, can have against a field."""
    target = draft.target.strip()
    if target and draft.base is None:
        try:
            snapshot.check_qube(target)
        except RefusedError as error:
            yield QUBE, str(error)
    if not draft.is_anybody and ANYBODY in draft.source_list:
        yield "srchosts", _("To let in everybody, choose “Anybody who can reach it”.")
    name = draft.name.strip()
    if draft.base is None and name:
        try:
            parse_new_name(name)
        except TextError as error:
            yield NAME, str(error)
        if (target, name) in snapshot.stored:
            yield NAME, _("{qube} already has a rule of that name.").format(qube=target)


def _named(draft: Draft, snapshot: Snapshot, now: float) -> NamedRule:
    """The rule as it would be stored. Raises `RuleError`."""
    options = draft.options(now)
    if draft.base is not None:
        return draft.base._replace(rule=changed_rule(snapshot.inventory, now, draft.base, options))
    rule = ForwardRule.from_options(options)
    if rule.expire is not None and rule.expire <= now:
        raise RuleError("option 'expire'", _("That time has already passed."), "expire")
    for source in rule.sources.qubes:
        try:
            snapshot.check_qube(source)
        except RefusedError as error:
            raise RuleError("option 'srchosts'", str(error), "srchosts") from None
    name = parse_new_name(draft.name.strip()) if draft.name.strip() else None
    return new_rule(snapshot, now, QubeName(draft.target.strip()), rule, name)


def _previewed(draft: Draft, named: NamedRule, snapshot: Snapshot, seen: Preview, now: float) -> Judgement:
    key: Key = named.key
    forward, problem = seen.forward, seen.problem
    lines, faults = [reasons.sentence(forward, problem)], dict[str, str]()
    if problem is not None:
        field = _BLAMED.get(problem.cause) or _BLAMED.get((problem.cause, problem.case))
        faults = {} if field is None else {field_of(draft, field): _("This is refused; see below.")}
    elif forward.named.rule.expire is not None and forward.cause is not Cause.EXPIRED:
        lines.append(_("It ends {time}.").format(time=print_expire(forward.named.rule.expire, now)))
    ways_out = reasons.ways_out(forward, problem)
    return Judgement(
        draft,
        button(draft, forward if problem is None else None),
        _headline(forward, problem, is_new=draft.base is None),
        lines=tuple(map(escaped, lines)),
        notes=() if problem is not None else tuple(map(_sentence, _notes(seen))),
        faults=faults,
        mends=of_ways_out(key, ways_out),
        named=named,
        forward=forward,
        seen=Seen.of(snapshot, key),
        is_fine=problem is None,
        now=now,
    )


def _headline(forward: Forward, problem: Finding | None, *, is_new: bool) -> str:
    if problem is not None:
        return _("This cannot be opened.") if is_new else _("This cannot be saved.")
    return {
        State.ACTIVE: _("This opens at once:"),
        State.WAITING: _("This opens, and waits for a qube:"),
        State.SUSPENDED: _("This stays closed until you confirm it:"),
        State.EXPIRED: _("This stays closed, because it has expired:"),
        State.DISABLED: _("This stays closed, because it is disabled:"),
        State.HELD: _("This stays closed, because everything is held:"),
    }.get(forward.state) or _("This stays closed, as it was:")


def _notes(seen: Preview) -> Iterator[str]:
    forward = seen.forward
    if seen.decision is not None:
        yield travel.decision_reason(forward, seen.decision)
    yield from changes.warnings(forward)
    hides = travel.hides_clients(forward)
    if hides is not None:
        yield hides


def _sentence(note: str) -> str:
    return escaped(f"{note[:1].upper()}{note[1:]}.")
