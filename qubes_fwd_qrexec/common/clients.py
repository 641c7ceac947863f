# SPDX-License-Identifier: GPL-2.0-or-later
"""Whom a rule lets in: networks, qubes by name, all qubes with a tag; or anybody.

Only dom0 knows the addresses of qubes; a listener gets `Sources`, which are networks. No text is both a
network and a name: a name begins with a letter and has neither colon nor slash, so ``fd00`` is a qube and
``fd00::/8`` a network. ``any`` is always everybody; a qube of that name can be let in by a tag.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NewType, Self

from .errors import TextError
from .values import IPNetwork, QubeName, Sources, parse_qube_name

TagName = NewType("TagName", str)

_TAG_PREFIX = "@tag:"
# qubes-core-admin qubes/vm/__init__.py, Tags.validate_tag().
_TAG = re.compile(r"[a-zA-Z0-9_-]+\Z", re.ASCII)
_NAME = re.compile(r"(?!any\Z)[a-zA-Z][^:/]*\Z")
_ANYBODY = Sources((), anyone=True)


def _parse_tag(text: str) -> TagName:
    tag = text.removeprefix(_TAG_PREFIX)
    if tag == text or not _TAG.match(tag):
        raise TextError(text, f"{_TAG_PREFIX}NAME, with a tag of [a-zA-Z0-9_-]")
    return TagName(tag)


@dataclass(frozen=True, slots=True)
class Clients:
    """Networks (``fixed``), qubes and tags, each sorted; raises `TextError` if there is nobody in it.

    Where ``fixed`` is anybody, nothing else is named.
    """

    fixed: Sources | None = None
    qubes: tuple[QubeName, ...] = ()
    tags: tuple[TagName, ...] = ()

    def __post_init__(self) -> None:
        if self.anyone and self.has_names:
            raise TextError(str(self), "a list: any lets in everybody, and stands alone")
        if self.fixed is None and not self.has_names:
            raise TextError(str(self), f"networks, names of qubes or {_TAG_PREFIX}NAME; or the word any")

    @classmethod
    def union(cls, some: Iterable["Clients"]) -> Self:
        """All whom these let in. Raises `TextError` if that is everybody and none of them says so."""
        all_of_them = list(some)
        if any(each.anyone for each in all_of_them):
            return cls(_ANYBODY)
        networks = [network for each in all_of_them for network in each.networks]
        return cls(
            Sources.of(networks) if networks else None,
            tuple(sorted({qube for each in all_of_them for qube in each.qubes})),
            tuple(sorted({tag for each in all_of_them for tag in each.tags})),
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Networks, names of qubes and ``@tag:NAME``, comma-separated; or ``any``. Raises `TextError`."""
        parts = text.split(",")
        tags = {part for part in parts if part.startswith("@")}
        qubes = {part for part in parts if _NAME.match(part)}
        networks = [part for part in parts if part not in tags | qubes]
        return cls(
            Sources.parse(",".join(networks)) if networks else None,
            tuple(sorted(map(parse_qube_name, qubes))),
            tuple(sorted(map(_parse_tag, tags))),
        )

    def __str__(self) -> str:
        fixed = () if self.fixed is None else (str(self.fixed),)
        return ",".join((*fixed, *self.qubes, *(f"{_TAG_PREFIX}{tag}" for tag in self.tags)))

    @property
    def anyone(self) -> bool:
        return self.fixed is not None and self.fixed.anyone

    @property
    def networks(self) -> tuple[IPNetwork, ...]:
        return () if self.fixed is None else self.fixed.networks

    @property
    def has_names(self) -> bool:
        """Whether only dom0 can resolve it to addresses."""
        return bool(self.qubes or self.tags)

    @property
    def versions(self) -> frozenset[int]:
        """The IP versions by which they may come: a subset of {4, 6}. A qube may come by both."""
        return frozenset((4, 6)) if self.fixed is None or self.has_names else self.fixed.versions
