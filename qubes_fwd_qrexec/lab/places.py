# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the qubes of a lab are: all on the loopback of this machine, or each in a network namespace."""

from typing import Protocol


class Places(Protocol):
    """``kind`` is ``loopback`` or ``namespaces``."""

    kind: str

    def namespace_fd(self, qube: str) -> int | None:
        """A qube's network namespace, where it has one of its own. Raises `StoreError`."""


class Loopback:
    """All qubes share this machine's network, so that a port can be taken once."""

    kind = "loopback"

    def namespace_fd(self, qube: str) -> int | None:
        return None
