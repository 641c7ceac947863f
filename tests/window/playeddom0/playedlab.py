# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab that has what it read in memory, as qubesd has, and reads again what was written since."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import Qube

# File systems count time in steps of some ms: what was written so lately may be written again unnoticed.
_YOUNG_NS = 100_000_000


class RememberedLab(LabDirectory):
    """The same as `LabDirectory`, and faster where one thing is asked for often."""

    _known: ClassVar[dict[Path, tuple[int, Any]]] = {}

    def features(self, name: str) -> dict[str, str]:
        read = super().features
        return self._remembered(self.qube_dir(name).features, lambda: read(name))

    def qube(self, name: str) -> Qube:
        read = super().qube
        return self._remembered(self.qube_dir(name).file, lambda: read(name))

    def _remembered(self, path: Path, read: Callable[[], Any]) -> Any:
        try:
            changed_ns = os.stat(path).st_mtime_ns
        except OSError:
            return read()
        known_ns, value = self._known.get(path, (None, None))
        if changed_ns != known_ns:
            now_ns = time.clock_gettime_ns(time.CLOCK_REALTIME)
            value = read()
            if changed_ns < now_ns - _YOUNG_NS:
                self._known[path] = changed_ns, value
        return value
