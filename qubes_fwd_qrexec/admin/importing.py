# SPDX-License-Identifier: GPL-2.0-or-later
"""Import: the rules and tunnel marks of a document, all of them or none."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from enum import Enum, auto
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import RefusedError, RuleError, TextError
from qubes_fwd_qrexec.common.exchange import Document, Read
from qubes_fwd_qrexec.common.rules import ForwardRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName

from .changing import Changed, System, change
from .inventory import DISPOSABLE, TUNNEL_FEATURE
from .snapshot import TUNNEL_NAME, NewLines, Snapshot, made_up_name, parse_new_name
from .states import Key

# The feature's value. The empty one also overrides a mark of the template.
_MARKS = {True: "1", False: ""}


class Prune(Enum):
    """Whose rules go that the document does not have: nobody's, those of the qubes that it names, or all."""

    NONE = auto()
    NAMED = auto()
    ALL = auto()


class Imported(NamedTuple):
    """What an import did; the first three are the rules of the document. ``marks`` are those that it has set,
    or with False taken away.
    """

    changed: Changed
    added: list[Key]
    replaced: list[Key]
    unchanged: list[Key]
    removed: list[Key]
    marks: Mapping[QubeName, bool]


def import_document(
    system: System,
    document: Document,
    qube: QubeName | None = None,
    *,
    is_replacing: bool = False,
    prune: Prune = Prune.NONE,
) -> Imported:
    """Store a document and apply it.

    ``qube`` is the target of rules for which the document names none. ``is_replacing``: the document may
    change rules and take marks away. Raises `RefusedError`, `RuleError`, and what `changing.change` does.
    """
    marks: dict[QubeName, bool] = {}
    rules: list[NamedRule] = []

    def decide(snapshot: Snapshot) -> NewLines:
        rules.extend(_placed(document, qube, snapshot))
        for named in rules:
            old = snapshot.stored.get(named.key)
            if old is not None and old != named and not is_replacing:
                raise RefusedError(
                    f"{named} already exists and differs; nothing was imported. With --replace, the "
                    "imported rule replaces it"
                )
        marks.update(_marks(document, snapshot, is_replacing=is_replacing))
        changes: dict[Key, str | None] = {
            (name, TUNNEL_NAME): _MARKS[is_marked] for name, is_marked in marks.items()
        }
        news = (named for named in rules if snapshot.stored.get(named.key) != named)
        gone = _pruned(snapshot.stored, rules, document, prune)
        return changes | dict.fromkeys(gone) | {named.key: str(named.rule) for named in news}

    changed = change(system, decide, "imported, nor was anything else", ports_alone=True)
    keys, stored = [rule.key for rule in rules], changed.before.stored
    named, differing = set(keys), set(changed.keys)
    return Imported(
        changed,
        added=[key for key in keys if key not in stored],
        replaced=[key for key in keys if key in stored and key in differing],
        unchanged=[key for key in keys if key not in differing],
        removed=[key for key in changed.keys if key not in named],
        marks=marks,
    )


def _pruned(stored: Iterable[Key], rules: Iterable[NamedRule], document: Document, prune: Prune) -> list[Key]:
    """The stored rules that the document lacks, readable or not; no marks, which keep forwards closed."""
    kept = {named.key for named in rules}
    named = {target for target, _ in kept} | document.tunnels.keys()
    qubes: Container[QubeName] = named if prune is Prune.NAMED else ()
    return [key for key in stored if key not in kept and (prune is Prune.ALL or key[0] in qubes)]


def _placed(document: Document, qube: QubeName | None, snapshot: Snapshot) -> list[NamedRule]:
    """The rules with target and name, owner and path."""
    placed: dict[tuple[str, str], NamedRule] = {}
    taken: dict[str, set[str]] = {}
    for qube_name, rule_name in snapshot.stored:
        taken.setdefault(qube_name, set()).add(rule_name)
    for read in document.rules:
        target = read.target or qube
        if target is None:
            raise RefusedError(f"{read.place}: the file does not name the qube; give --qube QUBE")
        if snapshot.inventory.get(target) is None:
            raise RefusedError(f"{read.place}: there is no qube {target!a}; nothing was imported")
        rule = _recorded(read, target, document, snapshot)
        try:
            name = parse_new_name(read.name or made_up_name(rule, taken.get(target, ())))
        except TextError as error:
            raise RuleError(read.place, str(error)) from None
        if (target, name) in placed:
            raise RefusedError(f"{read.place}: {target} {name} appears twice; nothing was imported")
        placed[target, name] = NamedRule(target, name, rule)
        taken.setdefault(target, set()).add(name)
    return list(placed.values())


def _recorded(read: Read, target: QubeName, document: Document, snapshot: Snapshot) -> ForwardRule:
    """A rule with owner and path. One that is stored keeps them, as an import agrees to no other netvms."""
    rule, here = read.rule, None if read.name is None else snapshot.stored.get((target, read.name))
    if isinstance(here, NamedRule):
        if here.rule == rule:
            return rule
        path = here.rule.path if rule.path is None else rule.path
        rule = replace(rule, owner=rule.owner or here.rule.owner, path=path)
    # An export has what a disposable inherited from its template, which nobody means to open.
    is_inherited = document.is_export and snapshot.inventory.qubes[target].klass == DISPOSABLE
    if rule.owner is None and not is_inherited:
        rule = replace(rule, owner=target)
    if rule.path is None:
        chain = snapshot.inventory.chain(target)
        if chain.problem is not None:
            raise RefusedError(f"{read.place}: {chain.problem}; nothing was imported")
        rule = replace(rule, path=chain.qubes)
    return rule


def _marks(document: Document, snapshot: Snapshot, *, is_replacing: bool) -> dict[QubeName, bool]:
    """The marks that change. Taking one away may open forwards, so that must be asked for."""
    found = {}
    for qube, is_marked in document.tunnels.items():
        known = snapshot.inventory.get(qube)
        if known is None:
            raise RefusedError(
                f"there is no qube {qube!a}, whose mark as a tunnel the file sets; nothing was imported"
            )
        if not is_marked and snapshot.inventory.feature(qube, TUNNEL_FEATURE) and not is_replacing:
            raise RefusedError(
                f"{qube} is marked as a tunnel, and the import says that it is not one; nothing was "
                "imported. With --replace, the mark is removed"
            )
        if known.features.get(TUNNEL_FEATURE) != _MARKS[is_marked]:
            found[qube] = is_marked
    return found
