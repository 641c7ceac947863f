#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Which file belongs to which package, and where it lies when installed.

    tools/parts.py list [PART]              what goes where: part, source, destination
    tools/parts.py install PART DESTDIR     put one part below DESTDIR
    tools/parts.py rpm-files PART           the part as %files of a spec file wants it
    tools/parts.py directories              those that the packages have to own

One answer for the Debian packages and for the RPMs. A file is placed by the directory that it lies in, so
that a new one needs no word here; one that has no place is an error and not left out.

The parts: `common` is what dom0 and the qubes both need, `dom0` what decides, `manager` its window, `vm` what
carries the traffic in exposed qubes and targets, `lab` the stand-in for a Qubes system. They share no file,
so all of them may be installed on one machine; each needs the ones that `NEEDS` names.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pagenames import other_names, section_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "qubes_fwd_qrexec"
NEEDS = {
    "common": (),
    "dom0": ("common",),
    "manager": ("common", "dom0"),
    "vm": ("common",),
    "lab": ("common", "dom0", "vm"),
}
DEBIAN_NAMES = {
    "common": "python3-qubes-fwd-qrexec",
    "dom0": "qubes-fwd-qrexec-dom0",
    "manager": "qubes-fwd-qrexec-manager",
    "vm": "qubes-fwd-qrexec",
    "lab": "qubes-fwd-qrexec-lab",
}
# The modules of system/ that dom0's programs use too; dom0 gets no others.
SYSTEM_IN_DOM0 = ("__init__", "clock", "ending", "inotify", "lockfile", "notify")
# Presets and sockets do not say where they belong, so their names do.
DOM0_UNITS = ("qubes-forward-watch", "70-qubes-forward-dom0")
UNIT_KINDS = (".service", ".socket", ".timer", ".path", ".target", ".slice")
ICONS = "hicolor/scalable/apps"
# What the agent starts for a call of qubes.ForwardTCP: the one program that is built.
HANDOVER = "usr/lib/qubes/qubes-forward-handover"
# Directories that other packages own: Fedora's filesystem and systemd, and those of qrexec and of icons that
# ours require.
# Every RPM that has a file in any other directory owns that.
DIRS_OF_OTHERS = (
    "etc/qubes-rpc",
    *("usr/bin", "usr/share/doc", "usr/share/man/man1", "usr/share/man/man7", "usr/share/man/man8"),
    *("usr/lib/qubes", "usr/lib/systemd/system-preset", "usr/lib/tmpfiles.d"),
    *("etc/xdg/autostart", "usr/share/applications", f"usr/share/icons/{ICONS}"),
)
_SCRIPT = """\
#!/usr/bin/python3 -I
# SPDX-License-Identifier: GPL-2.0-or-later
import sys

from {module} import {function}

sys.exit({function}())
"""


class PartsError(Exception):
    """A file has no place; the message says which, and what would be right."""


class Item(NamedTuple):
    """One file of a part. `make` says how it is generated from its source; ``link`` is where a link leads."""

    part: str
    source: str
    destination: str
    mode: int
    make: Callable[[Path], bytes] | None = None
    link: str = ""


def items(python_dir: str, unit_dir: str, zsh_dir: str) -> Iterator[Item]:
    """Everything that is installed. Raises `PartsError`."""
    programs = dict(_programs())
    yield from _modules(python_dir)
    for name, target in programs.items():
        yield Item(_part_of_program(target), "pyproject.toml", f"usr/bin/{name}", 0o755, _script(target))
    for file in _files("rpc"):
        item = _copy("vm", file, f"etc/qubes-rpc/{file.name}", 0o755)
        yield item._replace(link=f"/{HANDOVER}") if file.name == "qubes.ForwardTCP" else item
    for file in _files("handover"):
        yield Item("vm", _relative(file), HANDOVER, 0o755, _built)
    # Not at its final place, where qvm-forward writes: the packages put it there if nothing is.
    for file in _files("policy"):
        yield _copy("dom0", file, f"usr/share/qubes-fwd-qrexec/{file.name}")
    for file in sorted((ROOT / "docs").glob("*.schema.json")):
        part = _part_of_name(file.name.removesuffix(".schema.json"), programs)
        yield _copy(part, file, f"usr/share/qubes-fwd-qrexec/{file.name}")
    for file in _files("completions"):
        yield from _completion(file, _part_of_name(file.stem.removeprefix("_"), programs), zsh_dir)
    for file in _files("applications"):
        yield _copy("manager", file, f"usr/share/applications/{file.name}")
    for file in _files("autostart"):
        yield _copy("manager", file, f"etc/xdg/autostart/{file.name}")
    for file in _files(f"icons/{ICONS}"):
        yield _copy("manager", file, f"usr/share/icons/{ICONS}/{file.name}")
    for file in sorted((ROOT / "po").glob("*.po")):
        yield _catalogue(file)
    for file in _files("systemd"):
        yield _unit(file, unit_dir)
    for file in _files("tmpfiles.d"):
        yield _copy("vm", file, f"usr/lib/tmpfiles.d/{file.name}")
    for file in sorted((ROOT / "docs").glob("*.rst")):
        yield from _pages(file, _part_of_name(file.stem, programs))


def _programs() -> Iterator[tuple[str, str]]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        yield from tomllib.load(file)["project"]["scripts"].items()


def _modules(python_dir: str) -> Iterator[Item]:
    for file in sorted((ROOT / PACKAGE).rglob("*")):
        if not file.is_file() or file.suffix == ".pyc":
            continue
        part = part_of_module(file.relative_to(ROOT / PACKAGE))
        if file.suffix == ".py":
            yield _copy(part, file, f"{python_dir}/{_relative(file)}")
        elif file.suffix == ".md":
            yield _copy(part, file, f"usr/share/doc/{DEBIAN_NAMES[part]}/{file.name}")
        else:
            raise PartsError(f"{_relative(file)} is neither a module nor a document")


def part_of_module(path: Path) -> str:
    """The part of a module, by its path below the package. What no other part claims belongs to the qubes."""
    if path.parts[0] == "lab":
        return "lab"
    if path.parts[0] == "admin":
        return "dom0"
    if path.parts[0] == "window":
        return "manager"
    if path.parts[0] in ("common", "__init__.py") or (
        path.parts[0] == "system" and path.stem in SYSTEM_IN_DOM0
    ):
        return "common"
    return "vm"


def _part_of_program(target: str) -> str:
    return part_of_module(Path(*target.partition(":")[0].split(".")[1:]).with_suffix(".py"))


def _part_of_name(name: str, programs: dict[str, str]) -> str:
    """The part of a page or completion: that of its program or service. PROGRAM-COMMAND is a page too."""
    for program in (name, name.rpartition("-")[0]):
        if program in programs:
            return _part_of_program(programs[program])
    if (ROOT / "rpc" / name).exists():
        return "vm"
    raise PartsError(f"{name} is neither a program of pyproject.toml nor a service in rpc/")


def _unit(file: Path, unit_dir: str) -> Item:
    part = "dom0" if file.name.startswith(DOM0_UNITS) else "vm"
    if file.suffix == ".preset":
        return _copy(part, file, f"usr/lib/systemd/system-preset/{file.name}")
    if file.suffix in UNIT_KINDS:
        return _copy(part, file, f"{unit_dir}/{file.name}")
    raise PartsError(f"{_relative(file)} is neither a unit nor a preset")


def _completion(file: Path, part: str, zsh_dir: str) -> Iterator[Item]:
    """zsh reads all files that begin with ``_``. bash reads that of the program, so the lab has a copy."""
    if file.name.startswith("_"):
        yield _copy(part, file, f"{zsh_dir}/{file.name}")
        return
    place = f"usr/share/bash-completion/completions/{file.stem}"
    yield _copy(part, file, place)
    yield _copy("lab", file, f"{place}-lab")


def _catalogue(file: Path) -> Item:
    """A language's translations, as gettext reads them."""
    place = f"usr/share/locale/{file.stem}/LC_MESSAGES/qubes-fwd-qrexec.mo"
    return Item("manager", _relative(file), place, 0o644, _compiled)


def _compiled(source: Path) -> bytes:
    """Raises `PartsError` with what msgfmt says of a faulty catalogue."""
    try:
        done = subprocess.run(
            ["msgfmt", "--check", "--output-file=-", source], capture_output=True, check=False
        )
    except FileNotFoundError:
        raise PartsError("to compile catalogues of translations, install gettext") from None
    if done.returncode:
        raise PartsError(done.stderr.decode(errors="replace").strip())
    return done.stdout


def _built(source: Path) -> bytes:
    """A program, built as CC and the flags in the environment say. Raises `PartsError`."""
    said = (os.environ.get(name, "") for name in ("CPPFLAGS", "CFLAGS", "LDFLAGS"))
    command = shlex.split(" ".join((os.environ.get("CC", "cc"), *said)))
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / source.stem
        try:
            subprocess.run([*command, "-o", program, source], check=True)
        except FileNotFoundError:
            raise PartsError(f"to build {source.name}, install a C compiler") from None
        except subprocess.CalledProcessError:
            raise PartsError(f"{source.name} cannot be built") from None
        return program.read_bytes()


def _files(directory: str) -> list[Path]:
    found = sorted((ROOT / directory).glob("*"))
    for file in found:
        if not file.is_file():
            raise PartsError(
                f"{_relative(file)}/ is a directory; {directory}/ has only files that are installed"
            )
    return found


def _copy(part: str, file: Path, destination: str, mode: int = 0o644) -> Item:
    return Item(part, _relative(file), destination, mode)


def _relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def _script(target: str) -> Callable[[Path], bytes]:
    module, _, function = target.partition(":")
    return lambda _: _SCRIPT.format(module=module, function=function).encode()


def _pages(file: Path, part: str) -> Iterator[Item]:
    """A manual page, and one that redirects to it for each further name in its NAME line."""
    section = section_of(file.stem)
    place = f"usr/share/man/man{section}"
    yield Item(part, _relative(file), f"{place}/{file.stem}.{section}", 0o644, _page)
    for name in other_names(file):
        yield Item(part, _relative(file), f"{place}/{name}.{section}", 0o644, _leading)


def _page(source: Path) -> bytes:
    from manpage import man_page  # needs docutils, which only those who build packages have

    return man_page(source).encode()


def _leading(source: Path) -> bytes:
    section = section_of(source.stem)
    return f".so man{section}/{source.stem}.{section}\n".encode()


def install(item: Item, destdir: Path) -> None:
    path = destdir / item.destination
    path.parent.mkdir(parents=True, exist_ok=True)
    if item.link:
        path.symlink_to(item.link)
        return
    if item.make:
        path.write_bytes(item.make(ROOT / item.source))
    else:
        shutil.copyfile(ROOT / item.source, path)
    path.chmod(item.mode)


def own_directories(item: Item, python_dir: str, unit_dir: str) -> Iterator[str]:
    """The directories above a file that its package has to own, because no other does."""
    of_its_language = [str(Path(item.destination).parent)] if "/locale/" in item.destination else []
    others = {Path(name) for name in (python_dir, unit_dir, *DIRS_OF_OTHERS, *of_its_language)}
    others |= {parent for path in others for parent in path.parents}
    for directory in Path(item.destination).parents:
        if directory not in others:
            yield str(directory)


def rpm_lines(part: str, found: list[Item], python_dir: str, unit_dir: str) -> Iterator[str]:
    """A Python directory belongs to the package that has its ``__init__.py``; man pages get compressed."""
    directories = set()
    for item in found:
        if item.part != part:
            continue
        path = "/" + item.destination
        if path.endswith("/__init__.py"):
            yield "%dir " + path.removesuffix("/__init__.py")
            yield "%dir " + path.removesuffix("/__init__.py") + "/__pycache__"
        if path.startswith(f"/{python_dir}/"):
            yield f"%pycached {path}"
        else:
            yield _rpm_line(path)
            directories |= set(own_directories(item, python_dir, unit_dir))
    for directory in sorted(directories):
        # What is below doc/ comes with the %doc lines of the spec file.
        if not directory.startswith("usr/share/doc/"):
            yield f"%dir /{directory}"


def _rpm_line(path: str) -> str:
    if path.startswith("/usr/share/man/"):
        return f"{path}*"
    if path.startswith("/usr/share/locale/"):
        return f"%lang({path.split('/')[4]}) {path}"
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description="Which file belongs to which package.")
    parser.add_argument("--python-dir", default="usr/lib/python3/dist-packages")
    parser.add_argument("--unit-dir", default="usr/lib/systemd/system")
    parser.add_argument("--zsh-dir", default="usr/share/zsh/vendor-completions")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list")
    listing.add_argument("part", nargs="?", choices=list(NEEDS))
    for_rpm = commands.add_parser("rpm-files")
    for_rpm.add_argument("part", choices=list(NEEDS))
    commands.add_parser("directories")
    installing = commands.add_parser("install")
    installing.add_argument("part", choices=list(NEEDS))
    installing.add_argument("destdir", type=Path)
    arguments = parser.parse_args()
    python_dir, unit_dir = arguments.python_dir.strip("/"), arguments.unit_dir.strip("/")
    try:
        found = list(items(python_dir, unit_dir, arguments.zsh_dir.strip("/")))
        if arguments.command == "rpm-files":
            print(*rpm_lines(arguments.part, found, python_dir, unit_dir), sep="\n")
            return 0
        if arguments.command == "directories":
            owned = {path for item in found for path in own_directories(item, python_dir, unit_dir)}
            print(*sorted(owned), sep="\n")
            return 0
        for item in found:
            if arguments.part not in (None, item.part):
                continue
            if arguments.command == "install":
                install(item, arguments.destdir)
            else:
                print(item.part, item.source, item.destination)
    except PartsError as error:
        print(f"tools/parts.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
