# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands export and import: rules as documents, out of this system and into it."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace

from qubes_fwd_qrexec import exchange
from qubes_fwd_qrexec.errors import RefusedError, RuleError, StoreError, TextError
from qubes_fwd_qrexec.exchange import Read
from qubes_fwd_qrexec.rules import NamedRule
from qubes_fwd_qrexec.values import QubeName

from .session import Session, Snapshot, plan_as_json
from .states import Plan
from .store import made_up_name, parse_new_name


def export_rules(args: Namespace, session: Session) -> int:
    """Print rules; what cannot be read is left out, and said."""
    snapshot = session.look()
    for qube in args.qube:
        snapshot.check_qube(qube)
    rules = [rule for rule in snapshot.stored.rules if not args.qube or rule.target in args.qube]
    form = args.format or ("json" if session.is_json else "line")
    if session.is_json and form != "json":
        raise RefusedError(f"--json and --format {form} ask for two things; leave one out")
    if form == "json":
        session.say_json(exchange.as_json(rules))
    elif form == "xml":
        from qubes_fwd_qrexec.rulexml import print_document

        session.say(print_document(rules))
    else:
        session.say(exchange.print_lines(rules))
    broken = [rule for rule in snapshot.stored.broken if not args.qube or rule.target in args.qube]
    for rule in broken:
        session.warn(f"{rule.target} {rule.name!a} is left out, as it cannot be read")
    return 1 if broken else 0


def import_rules(args: Namespace, session: Session) -> int:
    """Store all rules of a document, or none."""
    found, skipped = _read(args.format, _text(args.file, session))
    with session.backend.locked():
        snapshot = session.look()
        rules = _placed(found, args.qube, snapshot)
        _check_room(rules, snapshot, is_replacing=args.replace)
        session.store({(named.target, named.name): str(named.rule) for named in rules})
        planned = session.look().plan(session.now) if args.no_apply else session.apply_change()
    forwards = [f for named in rules if (f := planned.find(named.target, named.name)) is not None]
    if session.is_json:
        data = {"imported": len(rules), "skipped": skipped, "applied": not args.no_apply}
        session.say_json(data | plan_as_json(Plan(tuple(forwards))))
        return 0
    session.say(f"Imported {len(rules)} forward{'' if len(rules) == 1 else 's'}.\n")
    if skipped:
        session.say(f"Left out {skipped} rule{'' if skipped == 1 else 's'} of other actions than forward.\n")
    for forward in forwards:
        session.say(f"{forward.source}: {forward.state}. {forward.reason}\n")
    return 0


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


def _read(form: str | None, text: str) -> tuple[list[Read], int]:
    """The rules of a document and how many were left out. Raises `RuleError`."""
    first = text.lstrip()[:1]
    form = form or ("xml" if first == "<" else "json" if first == "{" else "line")
    if form == "xml":
        from qubes_fwd_qrexec.rulexml import parse_document

        document = parse_document(text)
        return document.rules, document.skipped
    return (exchange.parse_json(text) if form == "json" else exchange.parse_lines(text)), 0


def _placed(found: Iterable[Read], qube: QubeName | None, snapshot: Snapshot) -> list[NamedRule]:
    """The rules under target and name; those that record no owner or path get today's."""
    placed: dict[tuple[str, str], NamedRule] = {}
    for read in found:
        target = read.target or qube
        if target is None:
            raise RefusedError(f"{read.place}: the file does not say for which qube; say --qube QUBE")
        if snapshot.inventory.get(target) is None:
            raise RefusedError(f"{read.place}: there is no qube {target}; nothing was imported")
        rule = read.rule
        if rule.owner is None:
            rule = replace(rule, owner=target)
        if rule.path is None:
            rule = replace(rule, path=snapshot.inventory.chain(target).qubes)
        try:
            taken = [*snapshot.stored.names(target), *(n for t, n in placed if t == target)]
            name = parse_new_name(read.name or made_up_name(rule, taken))
        except TextError as error:
            raise RuleError(read.place, str(error)) from None
        if (target, name) in placed:
            raise RefusedError(f"{read.place}: {target} {name} stands twice; nothing was imported")
        placed[target, name] = NamedRule(target, name, rule)
    return list(placed.values())


def _check_room(rules: Iterable[NamedRule], snapshot: Snapshot, *, is_replacing: bool) -> None:
    for named in rules:
        old = snapshot.stored.find(named.target, named.name)
        if old is not None and old != named and not is_replacing:
            raise RefusedError(
                f"{named} exists already and is another rule; nothing was imported. "
                "With --replace the imported one takes its place"
            )
