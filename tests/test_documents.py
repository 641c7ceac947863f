# SPDX-License-Identifier: GPL-2.0-or-later
"""The documents name files and facts that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
DOCUMENTS += (ROOT / "docs").glob("*.md")
GUIDE = (ROOT / "docs/guide").glob("*.md")
SPEC = ROOT / "qubes_fwd_qrexec/mux/SPEC.md"
FOLDERS = ("qubes_fwd_qrexec", "tests", "tools", "bench", "soak")
SOURCES = [str(file.relative_to(ROOT)) for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_link_leads_to_a_file(path: Path) -> None:
    for target in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_source_that_is_named_is_there(path: Path) -> None:
    """``leg.py`` as well as ``relay/leg.py``."""
    for name in re.findall(r"`([\w/]+\.py)`", path.read_text()):
        assert any(f"/{source}".endswith(f"/{name}") for source in SOURCES), name


@pytest.mark.parametrize("path", [*DOCUMENTS, *GUIDE, SPEC], ids=lambda path: path.stem)
def test_every_link_into_a_page_leads_to_a_heading(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^):#]*)#([^)]+)\)", path.read_text()):
        headings = re.findall(
            r"^#+ (.*)$", (path.parent / target if target else path).read_text(), re.MULTILINE
        )
        assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_facts_that_the_architecture_cites_are_numbered() -> None:
    facts = set(re.findall(r"^- \*\*([A-Z]\d+)\*\* ", (ROOT / "docs/facts.md").read_text(), re.MULTILINE))
    for cited in re.findall(r"\(([A-Z]\d+(?:, [A-Z]\d+)*)\)", (ROOT / "docs/architecture.md").read_text()):
        assert set(cited.split(", ")) <= facts, cited
