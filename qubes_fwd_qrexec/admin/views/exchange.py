# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands export and import: documents out of this system and into it."""

from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

from qubes_fwd_qrexec.admin.changing import System
from qubes_fwd_qrexec.admin.importing import Imported, Prune, import_document
from qubes_fwd_qrexec.admin.inventory import TUNNEL_FEATURE
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.common import exchange
from qubes_fwd_qrexec.common.errors import RuleError, StoreError, UsageError
from qubes_fwd_qrexec.common.exchange import Document
from qubes_fwd_qrexec.common.rules import BrokenRule, NamedRule

from . import changes, reasons, steps
from .session import Session
from .tables import counted, escaped

# More of them are only counted.
_NAMED_MAX = 10


def export_rules(args: Namespace, session: Session) -> int:
    """Print rules; what cannot be read is left out, and said."""
    snapshot = session.look()
    qubes = {snapshot.check_qube(qube) for qube in args.qube} or snapshot.inventory.qubes.keys()
    stored = [rule for rule in snapshot.stored.values() if rule.target in qubes]
    rules = [rule for rule in stored if isinstance(rule, NamedRule)]
    marks = {
        name: bool(value)
        for name in sorted(qubes)
        if (value := snapshot.inventory.qubes[name].features.get(TUNNEL_FEATURE)) is not None
    }
    form = args.format or ("json" if session.is_json else "line")
    if session.is_json and form != "json":
        raise UsageError(f"--json and --format {form} contradict each other; leave one out")
    if form == "json":
        session.say_json(exchange.as_json(rules, marks))
    elif form == "xml":
        from qubes_fwd_qrexec.common.rulexml import print_document

        session.say(print_document(rules, marks))
    elif form == "yaml":
        from qubes_fwd_qrexec.common.ruleyaml import print_document

        session.say(print_document(rules, marks))
    else:
        session.say(exchange.print_lines(rules, marks))
    broken = [rule for rule in stored if isinstance(rule, BrokenRule)]
    for rule in broken:
        session.warn(f"{rule.target} {rule.name!a} is left out, as it cannot be read")
    return 1 if broken else 0


def import_rules(args: Namespace, session: Session) -> int:
    """Store all rules and marks of a document, or none; or with --dry-run say what that would change."""
    document = _read(args.file, args.format, session)
    system = System(session.backend, session.now, not args.no_apply, not args.dry_run)
    prune = Prune.ALL if args.prune_all else Prune.NAMED if args.prune else Prune.NONE
    found = import_document(system, document, args.qube, is_replacing=args.replace, prune=prune)
    after, left = changes.followed(found.changed, session), _left_open(found, document)
    same, last = found.unchanged, list[str]()
    if same:
        last.append(f"Unchanged: {counted(len(same), 'forward') if same[_NAMED_MAX:] else _names(same)}.")
    if left:
        more = "--prune-all" if document.is_export else "--prune"
        closes = f"'qvm-forward remove QUBE NAME' closes one, and {more} removes what the file does not have"
        last.append(f"Still open, and not in the import: {_names(left)}. {closes}.")
    if document.skipped:
        last.append(f"Left out {counted(document.skipped, 'rule')} whose action is not forward.")
    if args.dry_run and not session.is_json:
        due = steps.text(found.changed.outcome.done, is_preview=True, first=_due(found))
        session.say(due or "Nothing to change.\n")
        session.say("".join(f"{line}\n" for line in last))
        session.warn_unread(found.changed.after)
        return 0
    kinds = {"added": found.added, "replaced": found.replaced, "unchanged": found.unchanged}
    kinds |= {"removed": found.removed, "left": left}
    data = {kind: [{"qube": qube, "name": name} for qube, name in keys] for kind, keys in kinds.items()}
    told = {"dry_run": args.dry_run, "tunnels": found.marks, "skipped": document.skipped}
    return changes.tell(after, session, _done(found, after), last=last, data=data | told)


def _left_open(found: Imported, document: Document) -> list[Key]:
    """What is open and not in the document: of all qubes if it is an export, else of those in it."""
    keys = {*found.added, *found.replaced, *found.unchanged}
    targets = {target for target, _ in keys}
    others = (forward.named.key for forward in found.changed.plan.live if forward.named.key not in keys)
    return [key for key in others if document.is_export or key[0] in targets]


def _names(keys: Iterable[Key]) -> str:
    return ", ".join(f"{qube} {escaped(name)}" for qube, name in keys)


def _done(found: Imported, after: changes.After) -> Iterator[str]:
    """What was imported, a change a line."""
    forwards = found.changed.forwards
    yield f"Imported {counted(len(forwards), 'forward')}."
    for qube, is_marked in found.marks.items():
        yield f"{qube} is {'' if is_marked else 'not '}marked as a tunnel."
    for key in found.removed:
        yield f"{_names([key])} is removed{changes.closed(after, key)}."
    for forward in forwards:
        yield f"{forward.named}: {forward.state}. {reasons.sentence(forward)}"
        for note in (*reasons.notes(forward), *after.news[forward.named.key]):
            yield f"{forward.named}: note: {escaped(note)}"


def _due(found: Imported) -> Iterator[str]:
    """What an import would store, a change a line."""
    for qube, is_marked in found.marks.items():
        yield f"{qube}: {'mark as a tunnel' if is_marked else 'take the mark of a tunnel away'}"
    for key in found.removed:
        yield f"{_names([key])}: remove"
    for named in (forward.named for forward in found.changed.forwards):
        old = found.changed.before.stored.get(named.key)
        yield f"{named}: {f'add {named.rule}' if old is None else '; '.join(_differences(old, named))}"


def _differences(old: NamedRule | BrokenRule, new: NamedRule) -> Iterator[str]:
    """The options that change, each with what it was."""
    was, now = old.rule.options() if isinstance(old, NamedRule) else {}, new.rule.options()
    for name in {**was, **now}:
        if was.get(name) != now.get(name):
            yield f"{name}={now.get(name, '')} instead of {was.get(name, 'its default')}"


def _read(path: str, form: str | None, session: Session) -> Document:
    """Raises `RuleError`, `StoreError` and `OSError`."""
    try:
        text = session.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: not text: {error}") from error
    first = text.lstrip()[:1]
    if not first:
        raise RuleError(
            "line 1",
            "there is nothing to import; even an export without forwards has a line with its version",
        )
    if form is None and path.endswith((".yaml", ".yml")):
        form = "yaml"
    form = form or ("xml" if first == "<" else "json" if first == "{" else "line")
    if form == "xml":
        from qubes_fwd_qrexec.common.rulexml import parse_document

        return parse_document(text)
    if form == "yaml":
        from qubes_fwd_qrexec.common.ruleyaml import parse_document

        return parse_document(text)
    return exchange.parse_json(text) if form == "json" else exchange.parse_lines(text)
