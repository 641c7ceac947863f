# SPDX-License-Identifier: GPL-2.0-or-later
"""What the firewall is to let through now, by the configuration as it was last read, and by the clock."""

import logging
import threading
from collections.abc import Iterable

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.rules import OnExpire
from qubes_fwd_qrexec.system.configsource import ConfigSource
from qubes_fwd_qrexec.system.lifetime import Expiry

from .pathrules import DRAIN_MAX_S, Kept

# QubesDB answers at once, or is about to be back.
REFRESH_S = 1.0
# dom0 takes away what is over by its own clock, which may be ahead of ours by so much.
_CLOCKS_APART_S = 10

_logger = logging.getLogger(__name__)


class Forwards:
    """The forwards of this qube: those of its listener, and those by nft (``paths``)."""

    def __init__(self, source: ConfigSource, before: Iterable[NftConfig] = ()) -> None:
        """``before``: what an earlier run has left in force."""
        self._source = source
        self._stamp: object = None
        self._configs: dict[str, ListenerConfig] = {}
        self._paths = {config.key: config for config in before}
        self._left: dict[str, NftConfig] = {}
        self._clocks: dict[tuple[str, int | None], Expiry] = {}
        self._over: set[tuple[str, int | None]] = set()
        self.refused: dict[str, str] = {}
        """The entries for forwards by nft that cannot be read, and why."""

    def read(self) -> None:
        """Read everything anew. Raises `ConfigError`.

        A bad entry for the listener leaves its forward as it was: dom0's policy decides on every call. By nft
        nobody else would decide, so a forward whose entry cannot be read is closed.
        """
        self._stamp = self._source.stamp()
        found = self._source.read()
        for _, error in sorted({**found.errors, **found.path_errors}.items()):
            _logger.error("refused: %s", error)
        self.refused = {key: str(error) for key, error in sorted(found.path_errors.items())}
        self._configs = found.forwards | {
            key: config for key, config in self._configs.items() if key in found.errors
        }
        for key, config in self._paths.items():
            if key not in self.refused and self._is_leaving(config):
                self._left[key] = config
        self._left = {key: config for key, config in self._left.items() if key not in found.paths}
        self._paths = found.paths

    def refresh(self) -> None:
        """Return when all that was configured before can be read, or after `REFRESH_S`."""
        done = threading.Event()
        self._source.refresh(done.set)
        done.wait(REFRESH_S)

    def has_changed(self) -> bool:
        """Whether the configuration may have changed since `read`."""
        return self._source.stamp() != self._stamp

    def active(self) -> tuple[ListenerConfig, ...]:
        """The listener's forwards that have not expired, which the clock never makes undone."""
        return tuple(
            config
            for _, config in sorted(self._configs.items())
            if not self._is_over(config.key, config.expire)
        )

    def paths(self) -> tuple[Kept, ...]:
        """The forwards by nft that are to be in force, also those that drain."""
        kept = {key: self._draining(config) for key, config in self._left.items()}
        kept |= {key: self._kept(config) for key, config in self._paths.items()}
        return tuple(forward for _, forward in sorted(kept.items()) if forward is not None)

    def over(self) -> tuple[NftConfig, ...]:
        """The configured forwards by nft whose time is over, whether they drain or not."""
        return tuple(c for _, c in sorted(self._paths.items()) if self._is_over(c.key, c.expire))

    def _kept(self, config: NftConfig) -> Kept | None:
        return self._draining(config) if self._is_over(config.key, config.expire) else Kept(config)

    def _draining(self, config: NftConfig) -> Kept | None:
        is_draining = config.on_expire is OnExpire.DRAIN
        if is_draining and not self._is_over(config.key, config.expire, DRAIN_MAX_S):
            return Kept(config, is_draining=True)
        return None

    def _is_leaving(self, config: NftConfig) -> bool:
        """Whether a forward's connections may finish if dom0 takes it away now: because its time is over."""
        is_draining = config.on_expire is OnExpire.DRAIN
        return is_draining and self._is_over(config.key, config.expire, -_CLOCKS_APART_S)

    def _is_over(self, key: str, expire: int | None, later_s: int = 0) -> bool:
        """Whether a time has come, which stays so whatever becomes of the clock."""
        until = None if expire is None else expire + later_s
        if self._clocks.setdefault((key, until), Expiry(until)).is_over():
            self._over.add((key, until))
        return (key, until) in self._over
