# SPDX-License-Identifier: GPL-2.0-or-later
"""Suggestions for a misspelled word."""

from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question to append to a message that ``word`` is unknown, or nothing."""
    from difflib import get_close_matches  # for errors alone, and half as long to import as all of --help

    near = get_close_matches(word, [*known], 1)
    return f"; did you mean {near[0]!a}?" if near else ""
