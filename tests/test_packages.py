# SPDX-License-Identifier: GPL-2.0-or-later
"""What the packages have: each file in one of them, and each of them with what it needs."""

import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from test_imports import MODULES, ROOT, ever_running, imports

import qubes_fwd_qrexec
from qubes_fwd_qrexec.admin.views import parser

CHECKOUT = ROOT.parent
PARTS = CHECKOUT / "tools" / "parts.py"
NEEDS: dict[str, set[str]] = {
    "common": {"common"},
    "dom0": {"common", "dom0"},
    "manager": {"common", "dom0", "manager"},
    "vm": {"common", "vm"},
    "lab": {"common", "dom0", "vm", "lab"},
}
# Of what there is at the top, that is what is installed; the other directories are for those who work on it.
SHIPPED = {"completions", "docs", "policy", "qubes_fwd_qrexec", "rpc", "systemd", "tmpfiles.d"}
SHIPPED |= {"applications", "autostart", "handover", "icons", "po"}
KEPT = {".ci", "bench", "debian", "rpm_spec", "soak", "tests", "tools"}


def tool(*words: str, directory: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(directory / "tools" / "parts.py"), *words]
    return subprocess.run(program, capture_output=True, text=True, check=False)


def lines_of(*words: str) -> list[list[str]]:
    done = tool(*words)
    assert not done.returncode, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


ITEMS = lines_of("--python-dir=py", "list")
PART_OF = {destination: part for part, _, destination in ITEMS}
MODULE_PARTS = {
    path.split("/", 2)[2].removesuffix(".py").replace("/", ".").removesuffix("__init__").rstrip("."): part
    for path, part in PART_OF.items()
    if path.startswith("py/")
}
# What is made here and not kept.
MADE = re.compile(r"\.git|build|dist|\.venv.*|\..*_cache|\.hypothesis|.*\.egg-info|__pycache__|\.coverage")


def kept(directory: Path = CHECKOUT) -> Iterator[str]:
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not MADE.fullmatch(path.name):
            yield from kept(path)
        elif path.is_file():
            yield str(path.relative_to(CHECKOUT))


FILES = set(kept())


def test_one_version() -> None:
    version = (CHECKOUT / "version").read_text().strip()
    assert version == qubes_fwd_qrexec.__version__
    assert (CHECKOUT / "debian" / "changelog").read_text().startswith(f"qubes-fwd-qrexec ({version}) ")
    assert f"\n## {version} " in (CHECKOUT / "CHANGELOG.md").read_text()


def test_two_parts_share_no_file() -> None:
    assert len(PART_OF) == len(ITEMS)
    assert set(PART_OF.values()) == NEEDS.keys()


def test_every_file_of_a_directory_that_ships_is_in_a_part() -> None:
    sources = {source for _, source, _ in ITEMS}
    installed = (".rst", ".schema.json")
    beside = {path for path in FILES if path.startswith("docs/") and not path.endswith(installed)}
    found = {path for path in FILES if path.split("/")[0] in SHIPPED}
    assert found - beside - sources == set()


def test_whether_a_directory_ships_is_said() -> None:
    found = {path.split("/")[0] for path in FILES if "/" in path}
    assert found <= SHIPPED | KEPT, "new: say in tools/parts.py where its files go"


def test_what_a_module_imports_is_in_its_package_or_in_one_that_is_required() -> None:
    graph = imports(ever_running)
    wrong = [
        f"{name} imports {found} of {MODULE_PARTS[found]}"
        for name, part in MODULE_PARTS.items()
        for found in graph[name] & MODULE_PARTS.keys()
        if MODULE_PARTS[found] not in NEEDS[part]
    ]
    assert wrong == []


def test_every_module_is_in_a_part() -> None:
    assert MODULE_PARTS.keys() == MODULES.keys()


def test_every_program_and_every_service_is_installed() -> None:
    import tomllib

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    assert {path for path in PART_OF if path.startswith("usr/bin/")} == {
        f"usr/bin/{name}" for name in project["project"]["scripts"]
    }
    data = project["tool"]["setuptools"]["data-files"]["share/qubes-fwd-qrexec/rpc"]
    services = {f"rpc/{file.name}" for file in (CHECKOUT / "rpc").iterdir()}
    assert set(data) == services
    assert services == {source for _, source, path in ITEMS if path.startswith("etc/qubes-rpc/")}


WITH_GETTEXT = pytest.mark.skipif(not shutil.which("msgfmt"), reason="gettext is not installed")
WITH_COMPILER = pytest.mark.skipif(not shutil.which("cc"), reason="the program 'cc' is missing")


@WITH_COMPILER
@WITH_GETTEXT
def test_no_program_takes_modules_from_its_environment_or_working_directory(tmp_path: Path) -> None:
    for part in ("dom0", "manager", "vm", "lab"):
        subprocess.run([sys.executable, PARTS, "install", part, tmp_path], check=True)
    programs = list((tmp_path / "usr" / "bin").iterdir())
    assert len(programs) > 3
    assert {program.read_text().splitlines()[0] for program in programs} == {"#!/usr/bin/python3 -I"}


@WITH_COMPILER
@WITH_GETTEXT
def test_for_a_call_the_agent_starts_the_program_that_hands_it_over(tmp_path: Path) -> None:
    assert not tool("install", "vm", str(tmp_path)).returncode
    entry = tmp_path / "etc" / "qubes-rpc" / "qubes.ForwardTCP"
    leads_to = entry.readlink()
    assert PART_OF[str(leads_to).removeprefix("/")] == "vm"
    assert (tmp_path / leads_to.relative_to("/")).read_bytes().startswith(b"\x7fELF")


def test_every_program_has_a_manual_page_in_its_package() -> None:
    pages = {Path(path).stem: part for path, part in PART_OF.items() if path.startswith("usr/share/man/")}
    programs = {Path(path).name: part for path, part in PART_OF.items() if path.startswith("usr/bin/")}
    assert {name: pages.get(name) for name in programs} == programs
    assert PART_OF["usr/share/man/man1/qubes-forward-manager.1"] == "manager"


@pytest.mark.parametrize("unit", sorted((CHECKOUT / "systemd").glob("*.service")), ids=lambda unit: unit.name)
def test_what_a_unit_starts_is_in_its_package(unit: Path) -> None:
    part = PART_OF[f"usr/lib/systemd/system/{unit.name}"]
    for program in re.findall(r"^Exec\w+=[-+!:@]*/(usr/bin/q\S+)", unit.read_text(), re.MULTILINE):
        assert PART_OF[program] == part


def test_dom0_gets_no_trio() -> None:
    control = (CHECKOUT / "debian" / "control").read_text().split("\n\n")
    with_trio = [paragraph.splitlines()[0] for paragraph in control if "trio" in paragraph]
    assert with_trio == ["Package: qubes-fwd-qrexec"]
    specs = (CHECKOUT / "rpm_spec").glob("*.spec.in")
    assert [spec.name for spec in specs if "trio" in spec.read_text()] == ["qubes-fwd-qrexec.spec.in"]


def test_only_the_window_needs_gtk() -> None:
    control = (CHECKOUT / "debian" / "control").read_text().split("\n\n")
    with_gtk = [paragraph.splitlines()[0] for paragraph in control if re.search(r"python3-gi|gtk", paragraph)]
    assert with_gtk == ["Package: qubes-fwd-qrexec-manager"]
    specs = (CHECKOUT / "rpm_spec").glob("*.spec.in")
    assert [spec.name for spec in specs if re.search("gobject|gtk", spec.read_text())] == [
        "qubes-fwd-qrexec-manager.spec.in"
    ]


ENTRIES = [path for path in PART_OF if path.endswith(".desktop")]


@pytest.mark.parametrize("path", ENTRIES)
def test_a_desktop_entry_starts_a_program_and_shows_an_icon_of_its_package(path: str) -> None:
    (source,) = [source for _, source, destination in ITEMS if destination == path]
    text = (CHECKOUT / source).read_text()
    entry = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    assert PART_OF[f"usr/bin/{entry['Exec']}"] == PART_OF[path] == "manager"
    assert PART_OF[f"usr/share/icons/hicolor/scalable/apps/{entry['Icon']}.svg"] == "manager"
    languages = [file.stem for file in (CHECKOUT / "po").glob("*.po")]
    translated = [key for key in entry if key in ("Name", "GenericName", "Comment", "Keywords")]
    assert [
        f"{key}[{name}]" for key in translated for name in languages if f"{key}[{name}]" not in entry
    ] == []


def test_the_indicator_starts_by_itself_and_never_in_a_qube_without_a_session_of_its_own() -> None:
    """All qubes of a template have its package, and what Qubes' session starts there is this directory."""
    assert "\nNotShowIn=X-QUBES;\n" in (CHECKOUT / "autostart/qubes-forward-indicator.desktop").read_text()
    assert PART_OF["etc/xdg/autostart/qubes-forward-indicator.desktop"] == "manager"


# Whose the directories of others are: of Fedora itself, or of a package that the spec file has to require.
OWNERS = {
    "etc/qubes-rpc": "qubes-core-qrexec-vm",
    "etc/xdg/autostart": "",
    "usr/bin": "",
    "usr/lib/qubes": "qubes-core-qrexec-vm",
    "usr/lib/systemd/system": "",
    "usr/lib/systemd/system-preset": "",
    "usr/lib/tmpfiles.d": "",
    "usr/share/applications": "",
    "usr/share/doc": "",
    "usr/share/icons/hicolor/scalable/apps": "hicolor-icon-theme",
    "usr/share/man/man1": "",
    "usr/share/man/man7": "",
    "usr/share/man/man8": "",
} | {f"usr/share/locale/{file.stem}/LC_MESSAGES": "" for file in (CHECKOUT / "po").glob("*.po")}


@pytest.mark.parametrize("part", NEEDS)
def test_every_directory_is_owned_by_a_package_or_was_there_before(part: str) -> None:
    """What no RPM owns stays when the packages go; a Debian package owns all above its files."""
    owned = {
        line[1].removeprefix("/")
        for needed in NEEDS[part]
        for line in lines_of("--python-dir=py", "rpm-files", needed)
        if line[0] == "%dir"
    }
    specs = {"common": "python3-qubes-fwd-qrexec"}
    specs |= {name: f"qubes-fwd-qrexec-{name}" for name in ("dom0", "manager")}
    spec = specs.get(part, "qubes-fwd-qrexec")
    required = re.findall(
        r"^Requires: +(\S+)", (CHECKOUT / "rpm_spec" / f"{spec}.spec.in").read_text(), re.MULTILINE
    )
    there_before = {path for path, owner in OWNERS.items() if not owner or owner in required}
    there_before |= {str(parent) for path in there_before for parent in Path(path).parents} | {"py"}
    # A line %doc of the spec file has its directory.
    there_before |= {"usr/share/doc/qubes-fwd-qrexec"} if part in ("vm", "lab") else set()
    found = {str(above) for path in PART_OF if PART_OF[path] == part for above in Path(path).parents}
    assert found - owned - there_before == set()


def test_an_rpm_makes_the_directories_of_tmpfiles_at_once() -> None:
    """As dh_installtmpfiles does: without them a qube that runs refuses mux calls until its next start."""
    spec = (CHECKOUT / "rpm_spec" / "qubes-fwd-qrexec.spec.in").read_text()
    scriptlet = spec.partition("\n%post\n")[2].partition("\n%preun\n")[0].splitlines()
    # By its name, and not in the part that is for a first installation alone.
    (line,) = [line for line in scriptlet if line.startswith("%tmpfiles_create ")]
    assert scriptlet.index(line) < scriptlet.index(
        'if [ "$1" -eq 1 ] && command -v systemctl >/dev/null; then'
    )
    assert line.split()[1:] == [path.name for path in sorted((CHECKOUT / "tmpfiles.d").iterdir())]


def test_debian_and_fedora_have_the_same_packages() -> None:
    control = (CHECKOUT / "debian" / "control").read_text()
    specs = {spec.name.removesuffix(".in"): spec.read_text() for spec in (CHECKOUT / "rpm_spec").iterdir()}
    names = {name.removesuffix(".spec") for name in specs}
    for name, text in specs.items():
        assert f"\nName:           {name.removesuffix('.spec')}\n" in text
        names |= {f"{name.removesuffix('.spec')}-{sub}" for sub in re.findall(r"\n%package (\S+)", text)}
    assert names == set(re.findall(r"^Package: (\S+)", control, re.MULTILINE))
    builder = yaml.safe_load((CHECKOUT / ".qubesbuilder").read_text())
    assert set(builder["vm"]["rpm"]["build"]) == {f"rpm_spec/{name}" for name in specs}
    assert set(builder["host"]["rpm"]["build"]) < set(builder["vm"]["rpm"]["build"])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The checkout, as far as parts.py reads it, to be changed."""
    for path in FILES:
        if path.split("/")[0] in SHIPPED | {"tools", "pyproject.toml"}:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes((CHECKOUT / path).read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("docs/what.rst", "what is neither a program of pyproject.toml nor a service in rpc/"),
        ("systemd/what.conf", "systemd/what.conf is neither a unit nor a preset"),
        ("rpc/more/what", "rpc/more/ is a directory"),
        ("qubes_fwd_qrexec/what.bin", "qubes_fwd_qrexec/what.bin is neither a module nor a document"),
    ],
)
def test_a_file_without_a_place_is_an_error(copy: Path, path: str, says: str) -> None:
    (copy / path).parent.mkdir(exist_ok=True)
    (copy / path).touch()
    done = tool("list", directory=copy)
    assert done.returncode == 1
    assert says in done.stderr


def test_each_shell_finds_the_completion_of_both_programs() -> None:
    bash = "usr/share/bash-completion/completions"
    assert PART_OF[f"{bash}/qvm-forward"] == "dom0"
    assert PART_OF[f"{bash}/qvm-forward-lab"] == "lab"
    assert PART_OF["usr/share/zsh/vendor-completions/_qvm-forward"] == "dom0"
    zsh = (CHECKOUT / "completions" / "_qvm-forward").read_text()
    assert zsh.startswith("#compdef qvm-forward qvm-forward-lab\n")
    lines = lines_of("--zsh-dir=/usr/share/zsh/site-functions", "rpm-files", "dom0")
    assert ["/usr/share/zsh/site-functions/_qvm-forward"] in lines


def test_a_new_file_finds_its_place_by_its_directory(copy: Path) -> None:
    places = {
        "qubes_fwd_qrexec/new.py": "vm usr/lib/python3/dist-packages/qubes_fwd_qrexec/new.py",
        "qubes_fwd_qrexec/admin/new.py": "dom0 usr/lib/python3/dist-packages/qubes_fwd_qrexec/admin/new.py",
        "rpc/qubes.ForwardNew": "vm etc/qubes-rpc/qubes.ForwardNew",
        "systemd/qubes-forward-new@.service": "vm usr/lib/systemd/system/qubes-forward-new@.service",
        "systemd/qubes-forward-watch.timer": "dom0 usr/lib/systemd/system/qubes-forward-watch.timer",
        "systemd/70-qubes-forward.preset": "vm usr/lib/systemd/system-preset/70-qubes-forward.preset",
        "tmpfiles.d/new.conf": "vm usr/lib/tmpfiles.d/new.conf",
        "docs/qvm-forward-lab.schema.json": "lab usr/share/qubes-fwd-qrexec/qvm-forward-lab.schema.json",
        "docs/qvm-forward-lab-json.rst": "lab usr/share/man/man7/qvm-forward-lab-json.7",
        "completions/_qvm-forward-lab": "lab usr/share/zsh/vendor-completions/_qvm-forward-lab",
        "docs/qvm-forward-new.rst": "dom0 usr/share/man/man1/qvm-forward-new.1",
        "docs/qubes.ForwardNew.rst": "vm usr/share/man/man8/qubes.ForwardNew.8",
    }
    for path in places:
        (copy / path).parent.mkdir(exist_ok=True)
        (copy / path).touch()
    listed = {line.split()[1]: line for line in tool("list", directory=copy).stdout.splitlines()}
    for path, place in places.items():
        part, _, destination = place.partition(" ")
        assert listed[path] == f"{part} {path} {destination}"


def test_dom0_alone_runs_and_names_the_package_that_a_lab_needs(tmp_path: Path) -> None:
    for part in ("common", "dom0"):
        assert not tool("install", part, str(tmp_path)).returncode
    place = str(tmp_path / "usr/lib/python3/dist-packages")
    names = [f"qubes_fwd_qrexec.{name}" for name, part in MODULE_PARTS.items() if name and part == "dom0"]
    code = (
        f"import importlib, sys; sys.path.insert(0, {place!r})\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "from qubes_fwd_qrexec.admin.views.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    # Without site-packages: what a dom0 has beside its own is not there, and trio is not either.
    words = [sys.executable, "-ISB", "-c", code, "--lab", "/somewhere", "list"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("/somewhere: to open a lab, install the package qubes-fwd-qrexec-lab\n")


@WITH_GETTEXT
def test_a_faulty_catalogue_is_an_error_that_names_the_place(copy: Path, tmp_path: Path) -> None:
    with (copy / "po" / "de.po").open("a") as catalogue:
        catalogue.write('\nmsgid "a"\nmsgstr "b\n')
    done = tool("install", "manager", str(tmp_path / "out"), directory=copy)
    assert done.returncode == 1
    assert re.search(r"po/de\.po:\d+: end-of-line within string", done.stderr)


def test_without_gettext_the_window_says_what_to_install(tmp_path: Path) -> None:
    words = [sys.executable, str(PARTS), "install", "manager", str(tmp_path)]
    done = subprocess.run(words, env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "tools/parts.py: to compile catalogues of translations, install gettext\n"


@WITH_COMPILER
@WITH_GETTEXT
def test_an_installed_program_is_one_that_runs(tmp_path: Path) -> None:
    for part in NEEDS:
        assert not tool("install", part, str(tmp_path)).returncode
    for name in ("qvm-forward", "qvm-forward-lab", "qubes-forward-listener", "qubes-forward-manager"):
        program = tmp_path / "usr" / "bin" / name
        assert program.stat().st_mode & 0o777 == 0o755
        done = subprocess.run(
            [sys.executable, program, "--version"], capture_output=True, text=True, check=True
        )
        assert qubes_fwd_qrexec.__version__ in done.stdout


def test_the_salt_states_are_states_and_their_commands_are_ours() -> None:
    text = (CHECKOUT / "docs" / "salt.md").read_text()
    states = [
        yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]
    commands = defaultdict(list)
    for name, body in (pair for state in states for pair in state.items()):
        ((function, arguments),) = body.items()
        assert re.fullmatch(r"[a-z]+\.[a-z]+", function), name
        for argument in arguments:
            ((key, value),) = argument.items()
            if function == "cmd.run" and isinstance(value, str):
                commands[key].append(shlex.split(value))
    assert commands.keys() == {"name", "unless", "onlyif"}
    for words in (words for found in commands.values() for words in found):
        assert words[0] == "qvm-forward"
        assert parser.build().parse_args(words[1:]).command == words[1]
