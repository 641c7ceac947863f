# SPDX-License-Identifier: GPL-2.0-or-later
"""Which forwards by nft are in force, or may be, and what ends with a change of them.

A file in the runtime directory remembers them, for a run that comes after one that was killed.
"""

import logging
from collections.abc import Collection
from pathlib import Path

from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.common.nftconfig import NftConfig

from .rule import Family
from .tables import Seen
from .wanted import Firewall, Wanted

# In the directory that the service manager made: an entry on each line, its key first.
IN_FORCE = "in-force"
_logger = logging.getLogger(__name__)


class InForce:
    """What the firewall lets through by nft, through all changes by `put`."""

    def __init__(self, firewall: Firewall, path: Path | None = None) -> None:
        self._firewall = firewall
        self._path = path
        self.configs = frozenset(_read(path)) if path is not None else frozenset()
        """What may be in force: after a failure that is the old and the new."""
        self.sure: frozenset[NftConfig] = frozenset()
        """What is known to be in force."""

    def put(self, wanted: Wanted) -> dict[Family, Seen]:
        """Let through exactly what is wanted. Returns the firewall as it was found. Raises `NftError`."""
        after = frozenset(kept.config for kept in wanted.paths)
        ended = [old for old in self.configs if not _goes_on(old, after)]
        self._remember(self.configs | after)
        found = self._firewall.keep(wanted)
        for config in sorted(ended, key=lambda config: config.key):
            _logger.info("ended: %s", config.key)
        self.sure = after
        self._remember(after)
        return found

    def _remember(self, configs: frozenset[NftConfig]) -> None:
        if configs == self.configs:
            return
        self.configs = configs
        if self._path is None:
            return
        hidden = self._path.with_name(f".{self._path.name}")
        try:
            lines = sorted(f"{config.key} {config}\n" for config in configs)
            hidden.write_text("".join(lines), encoding="ascii")
            hidden.rename(self._path)
        except OSError as error:
            _logger.warning("%s: %s", self._path, error.strerror)


def _goes_on(old: NftConfig, after: Collection[NftConfig]) -> bool:
    """Whether all that an old configuration let through still is, and to the same place."""
    return any(old.key == new.key and not new.narrows(old) for new in after)


def _read(path: Path) -> list[NftConfig]:
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        key, _, value = line.partition(" ")
        try:
            found.append(NftConfig.parse(key, value))
        except ConfigError as error:
            _logger.warning("%s: %s", path, error)
    return found
