# SPDX-License-Identifier: GPL-2.0-or-later
"""The window's own words in the user's language, by gettext. What `admin` says stays as it is.

Both functions look a text up when they are called, so call them where it is shown and never while a module
is imported. Facts go into the translated text: ``_("{qube} is halted").format(qube=name)``.
"""

import gettext
import os
from functools import cache

DOMAIN = "qubes-fwd-qrexec"
LOCALE_VARIABLE = "QUBES_FORWARD_LOCALE"
"""Names a directory of catalogues in place of the system's: those of a checkout."""


@cache
def _catalogue() -> gettext.NullTranslations:
    """The catalogue for LANGUAGE, LC_ALL, LC_MESSAGES or LANG; English where there is none."""
    return gettext.translation(DOMAIN, os.environ.get(LOCALE_VARIABLE), fallback=True)


def _(text: str) -> str:
    """The text in the user's language."""
    return _catalogue().gettext(text)


def ngettext(one: str, many: str, count: int) -> str:
    """The form for a number, in the user's language."""
    return _catalogue().ngettext(one, many, count)
