# SPDX-License-Identifier: GPL-2.0-or-later
"""Which qubes, properties and values fit a half typed command line of qvm-forward-lab.

`qubes_fwd_qrexec.admin.views.complete` does the rest.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

from qubes_fwd_qrexec.admin.inventory import LISTENER_FEATURE, NFT_FEATURE
from qubes_fwd_qrexec.admin.views.complete import Blank, Line
from qubes_fwd_qrexec.common.errors import ForwardError

from .directory import LabDirectory
from .knobs import KNOBS
from .netns import OUTSIDE
from .qube import LABELS, Qube, QubeClass
from .qubechanges import property_names

_SERVICE = "service."
_BOOLEANS = ("provides_network", "template_for_dispvms")
_READ_ONLY = ("icon", "klass", "name")


def _is_halted(qube: Qube) -> bool:
    return not qube.is_running


def _is_running(qube: Qube) -> bool:
    return qube.is_running


_FITS: Mapping[str, Callable[[Qube], bool]] = {
    "start": _is_halted,
    "remove": _is_halted,
    "shutdown": _is_running,
    "listen": _is_running,
    "run": _is_running,
}


class LabFitting:
    """What fits a line; nothing where there is no lab to read."""

    def __init__(self, line: Line, lab: str | None) -> None:
        """``lab`` is the lab's directory, if the line names no other."""
        self._line = line
        self._path = line.options.get("lab") or lab or ""

    def is_offered(self, option: argparse.Action) -> bool:
        return True

    def found(self, blank: Blank) -> Iterable[str]:
        try:
            return list(self._found(blank))
        except (ForwardError, OSError):
            return ()

    @cached_property
    def _lab(self) -> LabDirectory:
        return LabDirectory.open(self._path)

    @property
    def _qubes(self) -> list[Qube]:
        return [qube for qube in self._lab.qubes().values() if not qube.is_admin]

    def _found(self, blank: Blank) -> Iterable[str]:
        command, given = self._line.command, self._line.given
        if blank.option == "template":
            return self._templates(self._line.options.get("klass", QubeClass.APP))
        if blank.kind == "CLASS":
            return set(QubeClass) - {QubeClass.ADMIN}
        if blank.kind == "NAME" and command == "knob":
            return [*KNOBS, "drop"]
        if blank.kind == "QUBE":
            fits = _FITS.get(command)
            qubes = [qube for qube in self._qubes if fits is None or fits(qube)]
            found = [qube.name for qube in qubes if qube.name not in given]
            return [*found, *OUTSIDE] if command == "run" else found
        if not given or command == "knob" or blank.words:
            return blank.words
        if blank.kind == "PROPERTY":
            return [name for name in property_names(self._lab.qube(given[0])) if name not in _READ_ONLY]
        if blank.kind in ("FEATURE", "SERVICE"):
            return self._features(given[0])
        if blank.kind == "TAG":
            tags = self._lab.qube(given[0]).tags if given[1:2] == ["del"] else ()
            return [tag for tag in tags if tag not in given]
        return self._values(*given) if blank.kind == "VALUE" and command == "prefs" else ()

    def _features(self, qube: str) -> Iterable[str]:
        features = self._lab.features(qube)
        if self._line.command == "features":
            return features
        known = {*features, LISTENER_FEATURE, NFT_FEATURE}
        return [name.removeprefix(_SERVICE) for name in known if name.startswith(_SERVICE)]

    def _values(self, qube: str, key: str) -> Iterable[str]:
        if key == "netvm":
            return [qube.name for qube in self._qubes if qube.provides_network]
        if key == "template":
            return self._templates(self._lab.qube(qube).klass)
        if key == "label":
            return LABELS
        return ("True", "False") if key.replace("-", "_") in _BOOLEANS else ()

    def _templates(self, klass: str) -> Iterable[str]:
        """From what a qube of that class can be made."""
        if klass == QubeClass.DISPOSABLE:
            return [qube.name for qube in self._qubes if qube.template_for_dispvms]
        return [qube.name for qube in self._qubes if qube.klass is QubeClass.TEMPLATE]
