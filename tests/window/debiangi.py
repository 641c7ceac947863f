# SPDX-License-Identifier: GPL-2.0-or-later
"""PyGObject as Debian has it, for any Python of the same minor version, since building it takes minutes.

Of Debian's directory only that is found, so that nothing else of Debian's is used by chance.
"""

import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_PLACE = Path("/usr/lib/python3/dist-packages")
_MODULES = ("gi", "cairo")


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(_PLACE)]) if name in _MODULES else None


def offer() -> str | None:
    """Let this process import ``gi``. Returns why it cannot; None if it can."""
    built = _PLACE / f"gi/_gi{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not built.exists():
        return f"{built} is missing: GTK for this Python (Debian: python3-gi, gir1.2-gtk-3.0)"
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    return None
