# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests/equivalent-mutants excuses is still there."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXCUSED = [
    line
    for line in (ROOT / "tests/equivalent-mutants").read_text().splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize("excuse", EXCUSED)
def test_an_excused_mutant_is_of_a_line_that_is_there_and_has_a_reason(excuse: str) -> None:
    name, _, why = excuse.partition("  # ")
    file, _, change = name.partition(": ")
    before, _, after = change.partition("  ->  ")
    code = " ".join(line.strip() for line in (ROOT / file).read_text().splitlines())
    assert f" {before} " in code
    assert after != before
    assert why
