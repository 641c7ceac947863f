# SPDX-License-Identifier: GPL-2.0-or-later
"""Words are translated where there is a catalogue, and English where there is none."""

import subprocess
import sys
from pathlib import Path

_SAY = (
    "from qubes_fwd_qrexec.window.model.words import _, ngettext; "
    "print(_('Hello'), ngettext('one', 'many', 2))"
)


def said(locale_dir: Path) -> str:
    environ = {"QUBES_FORWARD_LOCALE": str(locale_dir), "LANGUAGE": "de", "LANG": "de_DE.UTF-8"}
    return subprocess.run(
        [sys.executable, "-c", _SAY], env=environ, check=True, capture_output=True, text=True
    ).stdout


def test_without_a_catalogue_it_is_english(tmp_path: Path) -> None:
    assert said(tmp_path) == "Hello many\n"
