# SPDX-License-Identifier: GPL-2.0-or-later
"""Imports run one way: what each part may know of the others."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "qubes_fwd_qrexec"
ROOT = Path(__file__).parent.parent / PACKAGE
VOCABULARY = ("errors", "values", "options", "rules", "exchange", "rulexml", "config")


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> set[str]:
    """Modules of ours by their name below the package; others with a leading slash."""
    found = set()
    package = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {"/" + alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                found.add("/" + str(node.module).split(".")[0])
                continue
            base = package[: len(package) - node.level + 1]
            if node.module:
                found.add(".".join((*base, node.module)))
            else:
                names = (".".join((*base, alias.name)) for alias in node.names)
                found |= {name if name in MODULES else ".".join(base) for name in names}
    return found


FILES = sorted(ROOT.rglob("*.py"))
MODULES = {module_name(file) for file in FILES}
IMPORTS = {module_name(file): imports_of(file) for file in FILES}
ADMIN = sorted(name for name in MODULES if name.split(".")[0] == "admin")
TUNNEL = sorted(name for name in MODULES if name.split(".")[0] == "tunnel")
VM_SIDE = sorted(
    name for name in MODULES if name and name.split(".")[0] not in {"admin", "lab", "tunnel", *VOCABULARY}
)


def reached_by(name: str) -> set[str]:
    """Everything that a module imports, directly or not."""
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        for found in IMPORTS.get(waiting.pop(), set()) - reached:
            reached.add(found)
            waiting.append(found)
    return reached


def ours(name: str) -> set[str]:
    return {module for module in reached_by(name) if not module.startswith("/") and module}


def test_no_module_imports_itself_in_a_circle() -> None:
    circles = [name for name in IMPORTS if name in reached_by(name) and name]
    assert [name for name in circles if not name.startswith("lab.")] == []


@pytest.mark.parametrize("name", [name for name in VOCABULARY if name in MODULES])
def test_the_vocabulary_knows_only_what_comes_before_it(name: str) -> None:
    before = VOCABULARY[: VOCABULARY.index(name)]
    assert ours(name) <= set(before)


@pytest.mark.parametrize("name", ADMIN)
def test_dom0_knows_nothing_of_the_qubes_programs_nor_of_trio(name: str) -> None:
    assert "/trio" not in reached_by(name)
    assert not ours(name) & set(VM_SIDE)


@pytest.mark.parametrize("name", VM_SIDE)
def test_the_qubes_programs_know_nothing_of_dom0(name: str) -> None:
    assert not any(found.split(".")[0] in ("admin", "lab") for found in ours(name))


@pytest.mark.parametrize("name", TUNNEL)
def test_the_tunnel_is_pure(name: str) -> None:
    forbidden = {"/trio", "/socket", "/select", "/time", "/threading", "/subprocess", "/logging"}
    assert not reached_by(name) & forbidden
    assert not ours(name) & set(VM_SIDE)


@pytest.mark.parametrize("name", ["relay", "exitstatus", "localserver", "configsource", "logs", *VOCABULARY])
def test_trio_stays_with_those_who_need_it(name: str) -> None:
    assert "/trio" not in reached_by(name)


def test_a_raw_call_imports_no_trio() -> None:
    """Whatever `service` imports only where it is needed, starting it does not."""
    code = f"import sys, {PACKAGE}.service; sys.exit('trio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_each_file_says_its_licence_first(file: Path) -> None:
    assert file.read_text().startswith("# SPDX-License-Identifier: GPL-2.0-or-later\n")
