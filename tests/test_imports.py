# SPDX-License-Identifier: GPL-2.0-or-later
"""Imports run one way: what each part may know of the others."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = "qubes_fwd_qrexec"
ROOT = Path(__file__).parent.parent / PACKAGE
ROOMS = {
    "common": set(),
    "system": {"common"},
    "mux": {"common"},
    "relay": {"common", "system", "mux"},
    "firewall": {"common", "system"},
    "exposed": {"common", "system", "mux", "relay"},
    "target": {"common", "system", "mux", "relay"},
    "admin": {"common", "system"},
    "window": {"common", "system", "admin"},
}
"""What each folder may know beside itself. The doors, `listener` and `service`, and the lab know more."""


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def ever_running(tree: ast.AST) -> Iterator[ast.AST]:
    """All but what is only for the type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and is_for_types(node):
            for other in node.orelse:
                yield other
                yield from ever_running(other)
        else:
            yield node
            yield from ever_running(node)


def running_at_once(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: no function's body either."""
    late: set[ast.AST] = set()
    for node in ever_running(tree):
        if node in late:
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            late.update(ast.walk(node))
        else:
            yield node


def room(name: str) -> str:
    """The folder that a module lies in, or its own name at the top."""
    return name.split(".")[0]


def ours_or_other(name: str) -> str:
    """A name as written out: of ours without the package before it, of others the top after a slash."""
    top, _, below = name.partition(".")
    return below if top == PACKAGE else f"/{top}"


def is_package(name: str) -> bool:
    return not name.startswith("/") and (ROOT / name.replace(".", "/")).is_dir()


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imports_of(file: Path, walk: Callable[[ast.AST], Iterable[ast.AST]] = ast.walk) -> set[str]:
    """Modules of ours by their name below the package; others with a leading slash."""
    found = set()
    package = file.relative_to(ROOT).parts[:-1]
    for node in walk(parsed(file)):
        if isinstance(node, ast.Import):
            found |= {ours_or_other(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            name = module if node.level else ours_or_other(str(node.module))
            # What is imported from a package may be a module of it.
            names = {f"{name}.{alias.name}".lstrip(".") for alias in node.names}
            found |= (names & MODULES.keys() or {name}) if is_package(name) else {name}
    return found


FILES = sorted(ROOT.rglob("*.py"))
MODULES = {module_name(file): file for file in FILES}
ADMIN = sorted(name for name in MODULES if room(name) == "admin")
MUX = sorted(name for name in MODULES if room(name) == "mux")
IN_ROOMS = sorted(name for name in MODULES if room(name) in ROOMS)


@cache
def imports(walk: Callable[[ast.AST], Iterable[ast.AST]] = ast.walk) -> dict[str, set[str]]:
    """What each module imports, of what ``walk`` gives of it."""
    return {name: imports_of(file, walk) for name, file in MODULES.items()}


def reached_by(name: str, graph: dict[str, set[str]] | None = None) -> set[str]:
    """Everything that a module imports, directly or not."""
    graph = imports() if graph is None else graph
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        for found in graph.get(waiting.pop(), set()) - reached:
            reached.add(found)
            waiting.append(found)
    return reached


def ours(name: str) -> set[str]:
    return {module for module in reached_by(name) if not module.startswith("/") and module}


def test_no_module_needs_itself_to_be_imported() -> None:
    """Two that name each other's types only for the type checker can be imported in any order."""
    at_once = imports(running_at_once)
    assert [name for name in MODULES if name and name in reached_by(name, at_once)] == []


def test_no_two_modules_know_each_other() -> None:
    """Neither at once, nor within a function, nor only for the type checker."""
    assert [name for name in MODULES if name and not is_package(name) and name in reached_by(name)] == []


@pytest.mark.parametrize("folder", ["bench", "soak"])
def test_no_two_modules_of_a_folder_beside_the_package_know_each_other(folder: str) -> None:
    graph: dict[str, set[str]] = {}
    for file in (ROOT.parent / folder).glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {name for node in nodes for name in (node.module, *(alias.name for alias in node.names))}
        graph[file.stem] = {str(name) for name in names}
    assert [name for name in graph if name in reached_by(name, graph)] == []


def test_what_is_only_for_types_or_within_functions_does_not_run_at_once() -> None:
    source = (
        "import a\nif TYPE_CHECKING:\n    import b\nelse:\n    import c\n"
        "def f():\n    import d\nclass C:\n    import e\n    def g(self):\n        import f\n"
        "try:\n    import g\nexcept ImportError:\n    import h\n"
    )

    def found(nodes: Iterable[ast.AST]) -> str:
        return "".join(sorted(node.names[0].name for node in nodes if isinstance(node, ast.Import)))

    assert found(ever_running(ast.parse(source))) == "acdefgh"
    assert found(running_at_once(ast.parse(source))) == "acegh"


def test_a_folder_knows_only_those_below_it() -> None:
    wrong = [
        f"{name} imports {found}"
        for name in IN_ROOMS
        for found in imports()[name]
        if found in MODULES and found and room(found) not in ROOMS[room(name)] | {room(name)}
    ]
    assert wrong == []


def test_the_folders_stand_above_each_other() -> None:
    below: set[str] = set()
    for folder, known in ROOMS.items():
        assert known <= below
        below.add(folder)


def strings_of(file: Path) -> set[str]:
    return {
        node.value
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_dom0_names_the_lab_in_one_place() -> None:
    """The lab is a plug-in of `admin.views.locate`, which loads it by this name where a lab is asked for."""
    found = {
        (module_name(file), value)
        for file in FILES
        if room(module_name(file)) in ROOMS
        for value in strings_of(file)
        if f"{PACKAGE}.lab" in value
    }
    assert found == {("admin.views.locate", f"{PACKAGE}.lab.store")}
    assert "lab.store" in MODULES


def test_dom0_knows_no_trio() -> None:
    assert [name for name in ADMIN if "/trio" in reached_by(name)] == []


def test_what_decides_knows_nothing_of_what_shows() -> None:
    deciding = [name for name in ADMIN if not name.startswith("admin.views")]
    assert [
        f"{name} imports {found}"
        for name in deciding
        for found in imports()[name]
        if found.startswith("admin.views")
    ] == []


def test_dom0_imports_what_only_qubes_has_when_it_is_needed_and_in_one_place() -> None:
    """They take longer to import than everything else takes to run; and a lab's machine lacks them."""
    of_qubes = {"/qubesadmin", "/qrexec"}
    assert [name for name in ADMIN if imports(running_at_once)[name] & of_qubes] == []
    elsewhere = [name for name in ADMIN if not name.startswith("admin.qubes.")]
    assert [name for name in elsewhere if imports()[name] & of_qubes] == []


def test_gtk_is_imported_in_one_place() -> None:
    """So nothing else asks for another version of it, and what does not show anything runs without it."""
    assert [name for name in MODULES if "/gi" in imports()[name]] == ["window.gtk"]


def test_what_the_window_knows_and_shows_is_known_without_gtk() -> None:
    """As values, which are tried without GTK and made by its threads."""
    model = {name for name in MODULES if f"{name}.".startswith("window.model.")}
    assert len(model) > 20
    assert {found for name in model for found in ours(name) if room(found) == "window"} <= {*model, "window"}


def test_only_the_programs_of_the_window_open_dialogs() -> None:
    openers = {name for name in MODULES for found in imports()[name] if found.startswith("window.dialogs.")}
    dialogs = {name for name in MODULES if name.startswith("window.dialogs.")}
    assert openers - dialogs == {"window.app", "window.tray"}


def test_the_protocol_is_pure() -> None:
    forbidden = {"/trio", "/socket", "/select", "/time", "/threading", "/subprocess", "/logging"}
    assert {name: reached_by(name) & forbidden for name in MUX if reached_by(name) & forbidden} == {}


WITHOUT_TRIO = (
    *(name for name in MODULES if room(name) in ("common", "system", "mux", "firewall")),
    *("target.localserver", "target.statusservice"),
    *("exposed.counters", "exposed.metrics"),
)


def test_trio_stays_with_those_who_need_it() -> None:
    assert [name for name in WITHOUT_TRIO if "/trio" in reached_by(name)] == []


def test_asyncio_with_its_slow_start_is_for_the_events_of_qubesd_alone() -> None:
    assert [name for name in MODULES if "/asyncio" in imports(ever_running)[name]] == ["admin.qubes.events"]


def test_a_raw_call_imports_no_trio() -> None:
    """Whatever `service` imports only where it is needed, starting it does not."""
    code = f"import sys, {PACKAGE}.service; sys.exit('trio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_file_says_its_licence_first() -> None:
    first = "# SPDX-License-Identifier: GPL-2.0-or-later\n"
    assert [file for file in FILES if not file.read_text().startswith(first)] == []
