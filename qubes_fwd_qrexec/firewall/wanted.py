# SPDX-License-Identifier: GPL-2.0-or-later
"""What the firewall is to let through at one moment, and keeping it so."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.nftconfig import NftConfig, Role

from . import listenrules, pathrules
from .openings import Opening, Socket, is_waiting, openings
from .pathrules import Kept
from .rule import Family, NftError, Rule
from .tables import FORWARD, INPUT, LISTENER, TABLE, Content, Guard, Place, Seen, transaction

_logger = logging.getLogger(__name__)

# Others may change the firewall between our look and our change; then we look again.
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to let through: the active forwards of the listener, on the ports where it listens, and those by
    nft; and what keeps cut connections from coming back. ``flows`` are the forwards of UDP whose flows may go
    on."""

    configs: tuple[ListenerConfig, ...] = ()
    listening: frozenset[Socket] = frozenset()
    flows: frozenset[ListenerConfig] = frozenset()
    paths: tuple[Kept, ...] = ()
    guards: Mapping[Family, tuple[Guard, ...]] = field(default_factory=dict)

    def rules(self, family: Family) -> tuple[Rule, ...]:
        """The rules for the listener."""
        return listenrules.rules(self.configs, family, self.listening)

    @property
    def open_to_flows(self) -> frozenset[Opening]:
        """By which openings the kernel may let flows in."""
        return frozenset(opening for config in self.flows for opening in openings(config, self.listening))

    def content(self, family: Family, seen: Seen) -> Content:
        """What to have in one family. A forward that finds no place in Qubes' table gets no rule at all."""
        found = [kept for kept in self.paths if seen.has(place_of(kept.config))]
        made = pathrules.content(found, family)
        listening = self.rules(family) if seen.has(LISTENER) else ()
        return replace(made, placed={**made.placed, LISTENER: listening}, guards=self.guards.get(family, ()))

    @property
    def waiting(self) -> tuple[str, ...]:
        """The keys of the forwards for which the listener does not listen on all ports."""
        waiting = (config.key for config in self.configs if is_waiting(config, self.listening))
        return tuple(waiting)


def place_of(config: NftConfig) -> Place:
    """Where Qubes' firewall lets through what a forward needs."""
    return FORWARD if config.role is Role.HOP else INPUT


class Tool(Protocol):
    """What is needed of `nfttool.Nft`. Each raises `NftError`."""

    def look(self) -> dict[Family, Seen]: ...
    def carry_out(self, transaction: str) -> None: ...


class Firewall:
    """What is ours in both families."""

    def __init__(self, nft: Tool) -> None:
        self._nft = nft

    def keep(self, wanted: Wanted) -> dict[Family, Seen]:
        """Let through exactly this. Returns what was there before. Raises `NftError`."""
        for _ in range(_TRIES - 1):
            try:
                return self._keep(wanted)
            except NftError as error:
                _logger.debug("again: %s", error)
        return self._keep(wanted)

    def _keep(self, wanted: Wanted) -> dict[Family, Seen]:
        """Both families, each by itself: what fails in one keeps nothing open in the other."""
        found = self._nft.look()
        problem: NftError | None = None
        for family, seen in found.items():
            if todo := transaction(family, wanted.content(family, seen), seen, time.time()):
                try:
                    self._nft.carry_out(todo)
                except NftError as error:
                    problem = problem or error
                    continue
                _logger.info(
                    "%s %s: %d rules let forwards in, %d forwards by nft",
                    family,
                    TABLE,
                    len(wanted.rules(family)),
                    sum(family.version in kept.config.versions for kept in wanted.paths),
                )
        if problem is not None:
            raise problem
        return found
