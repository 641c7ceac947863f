# SPDX-License-Identifier: GPL-2.0-or-later
"""Misspelled words."""

import pytest

from qubes_fwd_qrexec.common.nearest import did_you_mean

QUBES = ("work", "personal", "sys-net", "sys-firewall")


@pytest.mark.parametrize(
    ("word", "meant"), [("wrok", "work"), ("sysnet", "sys-net"), ("Work", "work"), ("personnal", "personal")]
)
def test_who_misspells_a_word_is_asked_for_the_nearest(word: str, meant: str) -> None:
    assert did_you_mean(word, QUBES) == f"; did you mean '{meant}'?"


@pytest.mark.parametrize("word", ["", "vault", "x"])
def test_a_word_like_no_other_is_not_guessed_at(word: str) -> None:
    assert did_you_mean(word, QUBES) == ""
    assert did_you_mean(word, ()) == ""
