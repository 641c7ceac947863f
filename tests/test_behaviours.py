# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/behaviours.md and docs/facts.md: each promise has tests that exist, and what is cited is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROMISE = re.compile(r"^(\d+)\. ", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
FACT = re.compile(r"^- \*\*([A-Z]\d+)\*\* ", re.MULTILINE)
CITED_PROMISES = re.compile(r"docs/behaviours\.md,((?: and|,| to|\s+|#|\d+)+)")
CITED_FACT = re.compile(r"docs/facts\.md,[\s#]+([A-Z]\d+)")


def promises() -> dict[int, str]:
    """Each promise, with its tests, by its number."""
    _, *parts = PROMISE.split((ROOT / "docs/behaviours.md").read_text())
    return {int(number): text for number, text in zip(parts[::2], parts[1::2], strict=True)}


def sources() -> list[Path]:
    folders = ("qubes_fwd_qrexec", "tests", "bench", "soak", "tools")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return [*files, *(ROOT / "docs").rglob("*.md")]


def test_promises_are_numbered_without_a_gap() -> None:
    numbers = PROMISE.findall((ROOT / "docs/behaviours.md").read_text())
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]


@pytest.mark.parametrize("number", promises())
def test_each_promise_has_tests_that_exist(number: int) -> None:
    tests = TEST.findall(promises()[number])
    assert tests
    for path, name in tests:
        assert re.search(rf"^(?:async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE), (path, name)


def test_each_fact_has_a_number_of_its_own() -> None:
    facts = FACT.findall((ROOT / "docs/facts.md").read_text())
    assert facts
    assert len(facts) == len(set(facts))


def test_what_is_cited_is_there() -> None:
    facts = set(FACT.findall((ROOT / "docs/facts.md").read_text()))
    known = promises().keys()
    for file in sources():
        text = file.read_text()
        for cited in CITED_PROMISES.findall(text):
            numbers = {int(number) for number in re.findall(r"\d+", cited)}
            assert numbers, (file, cited)
            assert numbers <= known, (file, cited)
        missing = set(CITED_FACT.findall(text)) - facts
        assert not missing, (file, missing)
