# SPDX-License-Identifier: GPL-2.0-or-later
"""Which forwards by nft are in force, or may be, what is open to flows, and what ends with a change of them.

A file in the runtime directory remembers them, for a run that comes after one that was killed.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qubes_fwd_qrexec.common.config import ListenerConfig, is_forward_key
from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.system.logs import RateLimit, warn

from .cutting import Cut, CutError, Cutter
from .openings import openings
from .rule import Family
from .tables import Seen
from .wanted import Firewall, Wanted

# In the directory that the service manager made: an entry on each line, its key first.
IN_FORCE = "in-force"
_logger = logging.getLogger(__name__)


class InForce:
    """What the firewall lets through by nft, and to flows of the listener, through all changes by `put`."""

    def __init__(self, firewall: Firewall, cutter: Cutter, path: Path | None = None) -> None:
        self._firewall = firewall
        self._cutter = cutter
        self._path = path
        self._limit = RateLimit()
        read = [] if path is None else list(_read(path))
        self.configs = frozenset(config for config in read if isinstance(config, NftConfig))
        """What may be in force: after a failure that is the old and the new."""
        self.flows = frozenset(config for config in read if isinstance(config, ListenerConfig))
        """The forwards of UDP that may have flows."""
        self._openings = frozenset(opening for config in self.flows for opening in openings(config))
        self.sure: frozenset[NftConfig] = frozenset()
        """What is known to be in force."""
        self.problem: str | None = None
        """Why connections that should have ended may go on."""

    @property
    def is_due(self) -> bool:
        """Whether `put` has something to do though nothing has changed."""
        return self.problem is not None or self._cutter.is_over

    def put(self, wanted: Wanted) -> dict[Family, Seen]:
        """Let through exactly what is wanted, and end what was let through and is not wanted any more.

        Returns the firewall as it was found. Raises `NftError`. Connections that could not be ended are a
        `problem`, and the next call tries again.
        """
        after, opened = frozenset(kept.config for kept in wanted.paths), wanted.open_to_flows
        by_key = {config.key: config for config in after}
        ended: list[Cut] = [old for old in self.configs if not _goes_on(old, by_key.get(old.key))]
        ended += [old for old in self._openings if not any(new.covers(old) for new in opened)]
        self._openings |= opened
        self._remember(self.configs | after, self.flows | wanted.flows)
        found = self._firewall.keep(replace(wanted, guards=self._cutter.guards(ended)))
        self.sure = after
        try:
            self._cutter.finish(ended, after | opened)
        except CutError as error:
            self.problem = str(error)
            warn(_logger, self._limit, "cut", self.problem)
        else:
            self.problem = None
            self._openings = opened
            self._remember(after, wanted.flows)
        return found

    def clear(self) -> None:
        """Let nothing through any more. Raises `NftError` or `CutError`."""
        self.put(Wanted())
        if self.problem is not None:
            raise CutError(self.problem)

    def _remember(self, configs: frozenset[NftConfig], flows: frozenset[ListenerConfig]) -> None:
        if (configs, flows) == (self.configs, self.flows):
            return
        self.configs, self.flows = configs, flows
        if self._path is None:
            return
        hidden = self._path.with_name(f".{self._path.name}")
        try:
            lines = sorted(f"{config.key} {config}\n" for config in configs | flows)
            hidden.write_text("".join(lines), encoding="ascii")
            hidden.rename(self._path)
        except OSError as error:
            _logger.warning("%s: %s", self._path, error.strerror)


def _goes_on(old: NftConfig, new: NftConfig | None) -> bool:
    """Whether all that an old configuration let through still is, and to the same place."""
    return new is not None and not new.narrows(old)


def _read(path: Path) -> Iterator[NftConfig | ListenerConfig]:
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        key, _, value = line.partition(" ")
        try:
            yield (ListenerConfig if is_forward_key(key) else NftConfig).parse(key, value)
        except ConfigError as error:
            _logger.warning("%s: %s", path, error)
