# SPDX-License-Identifier: GPL-2.0-or-later
"""The shape of the package: pure, small files, imports one way."""

import ast
import sys
from pathlib import Path

import pytest

from qubes_fwd_qrexec import mux

FOLDER = Path(mux.__file__).parent
ORDER = [
    "limits",
    "messages",
    "wire",
    "credit",
    "states",
    "stream",
    "abuse",
    "events",
    "reader",
    "outbox",
    "endpoint",
    "streams",
    "incoming",
    "connection",
    "flows",
    "__init__",
]
# No I/O, no clock, no threads, no randomness: only what works on values.
ALLOWED = {
    "abc",
    "collections.abc",
    "dataclasses",
    "enum",
    "functools",
    "ipaddress",
    "itertools",
    "struct",
    "typing",
}


def imports(name):
    """The names of modules that a file imports: of this package, and others."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            ours |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module)
    return ours, others


def test_every_file_has_its_place():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way_and_to_nothing_that_acts(name):
    ours, others = imports(name)
    assert ours <= set(ORDER[: ORDER.index(name)])
    assert others <= ALLOWED | {"qubes_fwd_qrexec.common.errors", "qubes_fwd_qrexec.common.values"}
    assert {module.partition(".")[0] for module in ALLOWED} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", ORDER)
def test_a_file_is_short_and_has_its_licence(name):
    lines = (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 400
    assert lines[0] == "# SPDX-License-Identifier: GPL-2.0-or-later"
