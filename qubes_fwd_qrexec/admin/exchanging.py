# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands export and import: rules and marks of tunnels as documents, out of this system and into it."""

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import replace

from qubes_fwd_qrexec.common import exchange
from qubes_fwd_qrexec.common.errors import RefusedError, RuleError, StoreError, TextError, UsageError
from qubes_fwd_qrexec.common.exchange import Document, Read
from qubes_fwd_qrexec.common.rules import ForwardRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName

from .apply import Outcome, others
from .inventory import DISPOSABLE, TUNNEL_FEATURE, Inventory
from .judged import denials
from .reconcile import apply
from .snapshot import Snapshot
from .states import Forward, NotOpenError, Plan
from .store import TUNNEL_NAME, made_up_name, parse_new_name, store
from .views import reasons
from .views.plans import plan_as_json
from .views.render import escaped
from .views.session import Session


def export_rules(args: Namespace, session: Session) -> int:
    """Print rules; what cannot be read is left out, and said."""
    snapshot = session.look()
    for qube in args.qube:
        snapshot.check_qube(qube)
    rules = [rule for rule in snapshot.stored.rules if not args.qube or rule.target in args.qube]
    tunnels = {
        qube.name: bool(qube.features[TUNNEL_FEATURE])
        for qube in sorted(snapshot.inventory.qubes.values(), key=lambda qube: qube.name)
        if TUNNEL_FEATURE in qube.features and (not args.qube or qube.name in args.qube)
    }
    form = args.format or ("json" if session.is_json else "line")
    if session.is_json and form != "json":
        raise UsageError(f"--json and --format {form} ask for two things; leave one out")
    if form == "json":
        session.say_json(exchange.as_json(rules, tunnels))
    elif form == "xml":
        from qubes_fwd_qrexec.common.rulexml import print_document

        session.say(print_document(rules, tunnels))
    else:
        session.say(exchange.print_lines(rules, tunnels))
    broken = [rule for rule in snapshot.stored.broken if not args.qube or rule.target in args.qube]
    for rule in broken:
        session.warn(f"{rule.target} {rule.name!a} is left out, as it cannot be read")
    return 1 if broken else 0


def import_rules(args: Namespace, session: Session) -> int:
    """Store all rules and marks of a document, or none."""
    document = _read(args.format, _text(args.file, session))
    with session.backend.locked():
        snapshot = session.look()
        rules = _placed(document, args.qube, snapshot)
        _check_room(rules, snapshot, is_replacing=args.replace)
        marks = _marks(document, snapshot, is_replacing=args.replace)
        before = snapshot.plan(session.now, is_held=False)
        _check_conflicts(rules, marks, before, snapshot, session.now)
        changes: dict[tuple[QubeName, str], str | None] = {
            (qube, TUNNEL_NAME): "1" if is_marked else "" for qube, is_marked in marks.items()
        }
        store(
            session.backend,
            snapshot.inventory,
            changes | {(named.target, named.name): str(named.rule) for named in rules},
        )
        if args.no_apply:
            planned, outcome = session.look().plan(session.now), Outcome()
        else:
            applied = apply(session.backend, session.now, changed="the rules are changed")
            planned, outcome, read = applied
            session.warn_unread(read)
    left = _left(document, rules, planned)
    forwards = [f for named in rules if (f := planned.find(named.target, named.name)) is not None]
    if session.is_json:
        data = {"imported": len(rules), "tunnels": marks, "skipped": document.skipped}
        data["left"] = [{"qube": named.target, "name": named.name} for named in left]
        session.say_json(data | {"applied": not args.no_apply} | plan_as_json(Plan(tuple(forwards))))
        return 0
    session.say(f"Imported {_count(len(rules), 'forward')}.\n")
    if document.skipped:
        session.say(f"Left out {_count(document.skipped, 'rule')} of other actions than forward.\n")
    for qube, is_marked in marks.items():
        session.say(f"{qube} is {'' if is_marked else 'not '}marked as a tunnel.\n")
    told = [*forwards, *_others(planned, before, rules)]
    denied = {} if args.no_apply else denials(told, session.backend)
    for forward in told:
        session.say(f"{forward.source}: {forward.state}. {reasons.sentence(forward)}\n")
        session.say("".join(f"{forward.source}: note: {note}\n" for note in reasons.notes(forward)))
        if (denial := denied.get(forward.source[:2])) is not None:
            session.say(f"{forward.source}: note: {escaped(denial)}\n")
    session.say("".join(f"{line}\n" for line in others(outcome, planned, [f.source for f in told])))
    if left:
        names = ", ".join(map(str, left))
        session.say(
            f"Not in the import, and left open: {names}. 'qvm-forward remove QUBE NAME' closes one.\n"
        )
    if not args.no_apply:
        session.say_unwatched(planned, rules)
    return 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _others(planned: Plan, before: Plan, rules: Iterable[NamedRule]) -> Iterable[Forward]:
    """The forwards that were there and are in another state now, as a tunnel was marked or not."""
    imported = {(named.target, named.name) for named in rules}
    for old in before:
        new = planned.find(old.source.target, old.source.name)
        key = (old.source.target, old.source.name)
        if new is not None and new.state is not old.state and key not in imported:
            yield new


def _text(path: str, session: Session) -> str:
    try:
        if path == "-":
            return session.stdin.read()
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: not text: {error}") from error


def _read(form: str | None, text: str) -> Document:
    """Raises `RuleError`."""
    first = text.lstrip()[:1]
    if not first:
        raise RuleError(
            "line 1", "there is nothing to import; even an export without forwards says its version"
        )
    form = form or ("xml" if first == "<" else "json" if first == "{" else "line")
    if form == "xml":
        from qubes_fwd_qrexec.common.rulexml import parse_document

        return parse_document(text)
    return exchange.parse_json(text) if form == "json" else exchange.parse_lines(text)


def _placed(document: Document, qube: QubeName | None, snapshot: Snapshot) -> list[NamedRule]:
    """The rules under target and name; owner and path are today's where the document does not say them."""
    placed: dict[tuple[str, str], NamedRule] = {}
    for read in document.rules:
        target = read.target or qube
        if target is None:
            raise RefusedError(f"{read.place}: the file does not say for which qube; say --qube QUBE")
        if snapshot.inventory.get(target) is None:
            raise RefusedError(f"{read.place}: there is no qube {target}; nothing was imported")
        rule = _recorded(read, target, document, snapshot)
        try:
            taken = [*snapshot.stored.names(target), *(n for t, n in placed if t == target)]
            name = parse_new_name(read.name or made_up_name(rule, taken))
        except TextError as error:
            raise RuleError(read.place, str(error)) from None
        if (target, name) in placed:
            raise RefusedError(f"{read.place}: {target} {name} stands twice; nothing was imported")
        placed[target, name] = NamedRule(target, name, rule)
    return list(placed.values())


def _recorded(read: Read, target: QubeName, document: Document, snapshot: Snapshot) -> ForwardRule:
    """A rule with owner and path; one that is stored exactly so already stays as it is."""
    rule, here = read.rule, None if read.name is None else snapshot.stored.find(target, read.name)
    if isinstance(here, NamedRule) and here.rule == rule:
        return rule
    # An export has what a disposable inherited from its template, which nobody means to open.
    is_inherited = document.is_export and snapshot.inventory.qubes[target].klass == DISPOSABLE
    if rule.owner is None and not is_inherited:
        rule = replace(rule, owner=target)
    if rule.path is None:
        chain = snapshot.inventory.chain(target)
        if chain.problem is not None:
            raise RefusedError(f"{read.place}: no way to record; nothing was imported. {chain.problem}")
        rule = replace(rule, path=chain.qubes)
    return rule


def _left(document: Document, rules: Iterable[NamedRule], planned: Plan) -> list[NamedRule]:
    """What is open and not in the document: of all qubes for an export, else of those that it is about."""
    imported, targets = {named[:2] for named in rules}, {named.target for named in rules}
    return [
        forward.source
        for forward in planned.live
        if forward.source[:2] not in imported and (document.is_export or forward.source.target in targets)
    ]


def _marks(document: Document, snapshot: Snapshot, *, is_replacing: bool) -> dict[QubeName, bool]:
    """The marks of tunnels that are not set already. Taking one away may open forwards: it must be said."""
    found = {}
    for qube, is_marked in document.tunnels.items():
        known = snapshot.inventory.get(qube)
        if known is None:
            raise RefusedError(f"there is no qube {qube} to mark as a tunnel or not; nothing was imported")
        if not is_marked and snapshot.inventory.feature(qube, TUNNEL_FEATURE) and not is_replacing:
            raise RefusedError(
                f"{qube} is marked as a tunnel, and the import says that it is none; nothing was imported. "
                "With --replace it is taken at its word"
            )
        if known.features.get(TUNNEL_FEATURE) != ("1" if is_marked else ""):
            found[qube] = is_marked
    return found


def _check_conflicts(
    rules: Iterable[NamedRule], marks: Mapping[QubeName, bool], before: Plan, snapshot: Snapshot, now: float
) -> None:
    """No imported rule claims a port that another rule has; one that did so before may be imported again."""
    qubes = dict(snapshot.inventory.qubes)
    for qube, is_marked in marks.items():
        features = {**qubes[qube].features, TUNNEL_FEATURE: "1" if is_marked else ""}
        qubes[qube] = qubes[qube]._replace(features=features)
    newcomers = {named[:2] for named in rules}
    after = snapshot._replace(inventory=Inventory(qubes), stored=snapshot.stored.with_rules(rules))
    for forward in after.plan(now, newcomers):
        if forward.conflict is None or forward.source[:2] not in newcomers:
            continue
        here = before.find(*forward.source[:2])
        if here is None or here.conflict is None or here.source != forward.source:
            done = f"nothing was imported, as {forward.source} would be in conflict"
            raise NotOpenError(done, forward, forward.conflict)


def _check_room(rules: Iterable[NamedRule], snapshot: Snapshot, *, is_replacing: bool) -> None:
    for named in rules:
        old = snapshot.stored.find(named.target, named.name)
        if old is not None and old != named and not is_replacing:
            raise RefusedError(
                f"{named} exists already and is another rule; nothing was imported. "
                "With --replace the imported one takes its place"
            )
