# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the qubes of a lab are: all on the loopback of this machine, or each in a network namespace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from .started import EnterQube


class Places(Protocol):
    """``kind`` is ``loopback`` or ``namespaces``."""

    kind: str

    def entering(self, qube: str) -> EnterQube:
        """A way for this thread to be in a qube's network for the length of a block without await."""


class Loopback:
    """All qubes share this machine's network, so that a port can be taken once."""

    kind = "loopback"

    def entering(self, qube: str) -> EnterQube:
        return _stay


@contextmanager
def _stay() -> Iterator[None]:
    yield
