# SPDX-License-Identifier: GPL-2.0-or-later
"""Live figures of a forward, as its listener would tell them; this version cannot ask it, and says so.

Whoever can ask makes a `FigureSource` and gives it to `status`.
"""

from typing import Any, NamedTuple, Protocol

from .states import Forward


class Figures(NamedTuple):
    """What a listener counts: ``connections`` are open now, the others were since it began.

    ``problem`` is what keeps it from listening, such as another program that has the port; the text was
    parsed and escaped where it came from.
    """

    connections: int
    accepted: int
    refused: int
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"is_known": True, **self._asdict()}


class Unknown(NamedTuple):
    """No figures, and one reason."""

    reason: str

    def as_json(self) -> dict[str, Any]:
        return {"is_known": False, "reason": self.reason}


class FigureSource(Protocol):
    """Asks the listeners; it never raises, as what cannot be asked is unknown."""

    def figures(self, forward: Forward) -> Figures | Unknown:
        """The figures of one live forward."""


class NoFigures:
    """The source of a version that asks nobody."""

    def figures(self, forward: Forward) -> Figures | Unknown:
        return Unknown("this version cannot ask the listeners")
