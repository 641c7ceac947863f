# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands export and import: documents out of this system and into it."""

from argparse import Namespace
from pathlib import Path

from qubes_fwd_qrexec.admin.changing import System
from qubes_fwd_qrexec.admin.importing import import_document
from qubes_fwd_qrexec.admin.inventory import TUNNEL_FEATURE
from qubes_fwd_qrexec.common import exchange
from qubes_fwd_qrexec.common.errors import RuleError, StoreError, UsageError
from qubes_fwd_qrexec.common.exchange import Document
from qubes_fwd_qrexec.common.rules import BrokenRule, NamedRule

from . import changes, reasons
from .session import Session
from .tables import counted, escaped


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
    else:
        session.say(exchange.print_lines(rules, marks))
    broken = [rule for rule in stored if isinstance(rule, BrokenRule)]
    for rule in broken:
        session.warn(f"{rule.target} {rule.name!a} is left out, as it cannot be read")
    return 1 if broken else 0


def import_rules(args: Namespace, session: Session) -> int:
    """Store all rules and marks of a document, or none."""
    document = _read(args.file, args.format, session)
    system = System(session.backend, session.now, is_applied=not args.no_apply)
    changed, marks = import_document(system, document, args.qube, is_replacing=args.replace)
    # Of all qubes if the document is an export, else of those in it.
    targets = {target for target, _ in changed.keys}
    others = (f.named for f in changed.plan.live if f.named[:2] not in changed.keys)
    left_open = [named for named in others if document.is_export or named.target in targets]
    after = changes.followed(changed, session)
    data = {
        "imported": len(changed.keys),
        "tunnels": marks,
        "skipped": document.skipped,
        "left": [{"qube": named.target, "name": named.name} for named in left_open],
    }
    lines = [f"Imported {counted(len(changed.keys), 'forward')}."]
    if document.skipped:
        lines.append(f"Left out {counted(document.skipped, 'rule')} whose action is not forward.")
    for qube, is_marked in marks.items():
        lines.append(f"{qube} is {'' if is_marked else 'not '}marked as a tunnel.")
    for forward in changed.forwards:
        lines.append(f"{forward.named}: {forward.state}. {reasons.sentence(forward)}")
        for note in (*reasons.notes(forward), *changes.news(after, forward)):
            lines.append(f"{forward.named}: note: {escaped(note)}")
    names = ", ".join(map(str, left_open))
    last = f"Still open, and not in the import: {names}. 'qvm-forward remove QUBE NAME' closes one."
    return changes.tell(after, session, lines, last=[last] if left_open else [], data=data)


def _read(path: str, form: str | None, session: Session) -> Document:
    """Raises `RuleError`, `StoreError` and `OSError`."""
    try:
        text = session.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: not text: {error}") from error
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
