# SPDX-License-Identifier: GPL-2.0-or-later
"""Import: the rules and tunnel marks of a document, all of them or none."""

from collections.abc import Mapping
from dataclasses import replace

from qubes_fwd_qrexec.common.errors import RefusedError, RuleError, TextError
from qubes_fwd_qrexec.common.exchange import Document, Read
from qubes_fwd_qrexec.common.rules import ForwardRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName

from .changing import Changed, System, change
from .inventory import DISPOSABLE, TUNNEL_FEATURE
from .snapshot import TUNNEL_NAME, Changes, Snapshot, made_up_name, names_at, parse_new_name
from .states import Key

# The feature's value. The empty one also overrides a mark of the template.
_MARKS = {True: "1", False: ""}


def import_document(
    system: System, document: Document, qube: QubeName | None = None, *, is_replacing: bool = False
) -> tuple[Changed, Mapping[QubeName, bool]]:
    """Store a document and apply it. Returns also the marks that it has set, or with False taken away.

    ``qube`` is the target of rules for which the document names none. ``is_replacing``: the document may
    change rules and take marks away. Raises `RefusedError`, `RuleError`, and what `changing.change` does.
    """
    marks: dict[QubeName, bool] = {}

    def decide(snapshot: Snapshot) -> Changes:
        rules = _placed(document, qube, snapshot)
        for named in rules:
            old = snapshot.stored.get(named[:2])
            if old is not None and old != named and not is_replacing:
                raise RefusedError(
                    f"{named} exists already and differs; nothing was imported. With --replace the "
                    "imported one takes its place"
                )
        marks.update(_marks(document, snapshot, is_replacing=is_replacing))
        changes: dict[Key, str | None] = {
            (name, TUNNEL_NAME): _MARKS[is_marked] for name, is_marked in marks.items()
        }
        return changes | {named[:2]: str(named.rule) for named in rules}

    return change(system, decide, "imported, nor was anything else", ports_alone=True), marks


def _placed(document: Document, qube: QubeName | None, snapshot: Snapshot) -> list[NamedRule]:
    """The rules with target and name; owner and path are today's where the document does not say them."""
    placed: dict[tuple[str, str], NamedRule] = {}
    for read in document.rules:
        target = read.target or qube
        if target is None:
            raise RefusedError(f"{read.place}: the file does not name the qube; give --qube QUBE")
        if snapshot.inventory.get(target) is None:
            raise RefusedError(f"{read.place}: there is no qube {target!a}; nothing was imported")
        rule = _recorded(read, target, document, snapshot)
        try:
            taken = [*names_at(snapshot.stored, target), *(n for t, n in placed if t == target)]
            name = parse_new_name(read.name or made_up_name(rule, taken))
        except TextError as error:
            raise RuleError(read.place, str(error)) from None
        if (target, name) in placed:
            raise RefusedError(f"{read.place}: {target} {name} appears twice; nothing was imported")
        placed[target, name] = NamedRule(target, name, rule)
    return list(placed.values())


def _recorded(read: Read, target: QubeName, document: Document, snapshot: Snapshot) -> ForwardRule:
    """A rule with owner and path; one that is stored exactly so already stays as it is."""
    rule, here = read.rule, None if read.name is None else snapshot.stored.get((target, read.name))
    if isinstance(here, NamedRule) and here.rule == rule:
        return rule
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
            raise RefusedError(f"there is no qube {qube!a} to mark as a tunnel or not; nothing was imported")
        if not is_marked and snapshot.inventory.feature(qube, TUNNEL_FEATURE) and not is_replacing:
            raise RefusedError(
                f"{qube} is marked as a tunnel, and the import says that it is not one; nothing was "
                "imported. --replace removes the mark"
            )
        if known.features.get(TUNNEL_FEATURE) != _MARKS[is_marked]:
            found[qube] = is_marked
    return found
