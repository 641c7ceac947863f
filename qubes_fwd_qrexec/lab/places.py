# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the qubes of a lab are: all on the loopback of this machine, or each in a network namespace."""

from collections.abc import Iterable
from typing import Protocol

from .qube import Qube


class Places(Protocol):
    """``kind`` is ``loopback`` or ``namespaces``."""

    kind: str

    @property
    def why_no_ip(self) -> str | None:
        """Why the qubes have no firewall and no IP to each other, in one line, or None if they do."""

    def namespace_fd(self, qube: str) -> int | None:
        """A qube's network namespace, where it has one of its own. Raises `StoreError`."""

    def follow(self, qubes: Iterable[Qube]) -> None:
        """The lab's qubes are these now. Blocks; for any thread, one at a time. Raises `StoreError`."""


class Loopback:
    """All qubes share this machine's network, so that a port can be taken once."""

    kind = "loopback"
    why_no_ip = (
        "its qubes share this machine's loopback (the loopback form); 'qvm-forward-lab up' by root gives "
        "each a network of its own, with the packages iproute2 and nftables"
    )

    def namespace_fd(self, qube: str) -> int | None:
        return None

    def follow(self, qubes: Iterable[Qube]) -> None:
        """They are all in the same place."""
