# SPDX-License-Identifier: GPL-2.0-or-later
"""The program itself: what it imports, and where it works."""

import importlib.util
import os
import select
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from bounds import BOUND_S
from fake_admin import FakeQubes
from worlds import ADD

from qubes_fwd_qrexec.admin.views import cli, locate
from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.lab.directory import LabDirectory

ROOT = Path(__file__).parents[3]


def test_without_a_lab_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"not a Qubes system.*qvm-forward-lab init DIR.*--lab DIR"):
        locate.open_backend(None, {}, str(tmp_path))


def test_on_a_qubes_system_it_says_which_packages_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    (tmp_path / "usr/share/qubes/marker-vm").mkdir(parents=True)
    packages = "install python3-qubesadmin and qubes-core-qrexec"
    with pytest.raises(
        RefusedError, match=f"a command for dom0, and this is a qube; run it in dom0.*{packages}"
    ):
        locate.open_backend(None, {}, str(tmp_path))
    (tmp_path / "etc/qubes-release").mkdir(parents=True)
    with pytest.raises(RefusedError, match=f"dom0 lacks packages that qvm-forward needs: {packages}"):
        locate.open_backend(None, {}, str(tmp_path))


def test_a_qubes_system_is_not_asked_before_something_is_to_be_known(
    dom0: FakeQubes, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    real = sys.modules["qubesadmin"].Qubes
    monkeypatch.setattr(sys.modules["qubesadmin"], "Qubes", lambda: started.append(1) or real())
    backend = locate.open_backend(None, {}, str(dom0.root))
    assert (started, dom0.calls) == ([], [])
    assert backend.inventory().qubes
    assert started


def test_a_lab_that_is_named_is_taken_also_on_a_qubes_system(dom0: FakeQubes, lab: LabDirectory) -> None:
    assert locate.open_backend(str(lab.root), {}).inventory().qubes
    assert dom0.calls == []


@pytest.mark.parametrize("environ", [{}, {"QVM_FORWARD_LAB": "/a-lab"}])
def test_a_lab_of_an_empty_name_is_not_taken_for_the_system_itself(
    dom0: FakeQubes, environ: dict[str, str]
) -> None:
    with pytest.raises(RefusedError, match="--lab is empty"):
        locate.open_backend("", environ)


def _program(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qubes_fwd_qrexec.admin.views.cli", *argv]
    return subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environ,
        text=True,
        capture_output=True,
        check=False,
        timeout=BOUND_S,
    )


def test_the_program_itself_runs(lab: LabDirectory) -> None:
    done = _program("list", QVM_FORWARD_LAB=str(lab.root))
    assert (done.returncode, done.stdout, done.stderr) == (0, "No forwards.\n", "")
    assert _program("--version").stdout.strip() == cli.parser.__version__


_EVERY_COMMAND = (
    ADD,
    ("list",),
    ("plan",),
    ("show", "work", "web"),
    ("status",),
    ("policy",),
    ("apply",),
    ("tunnel", "mark", "vault"),
    ("tunnel", "list"),
    ("export", "--format", "xml"),
    ("export", "--json"),
    ("panic",),
)


def _imported(*argv: str) -> tuple[set[str], set[str]]:
    """What a command has imported when it is done: modules of this package by their names in it, and others.

    To import takes nearly all of the time until it answers; `make bench ARGS=admin` measures the whole.
    """
    code = (
        "import sys\n"
        "from qubes_fwd_qrexec.admin.views import cli\n"
        f"try:\n    status = cli.main({list(argv)!r})\n"
        "finally:\n    print(*sys.modules, file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    # -S: no site-packages, whose .pth files may import what they like.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=BOUND_S,
    )
    assert done.returncode == 0
    names = set(done.stderr.split())
    ours = {name for name in names if name.partition(".")[0] == "qubes_fwd_qrexec"}
    return {name.removeprefix("qubes_fwd_qrexec.") for name in ours}, names - ours


# Each would be a tenth or more of the time that a command may take to start.
_SLOW = {"asyncio", "concurrent.futures", "http", "logging", "lxml", "shutil", "socket", "tempfile", "xml"}


def test_help_imports_nothing_that_a_command_needs() -> None:
    """What reads rules and plans takes longer to import than all the rest takes."""
    ours, others = _imported("--help")
    modules = {"views", "views.cli", "views.parser", "views.tables", "views.locate"}
    commons = {"common", "common.errors", "common.nearest"}
    assert ours == {"qubes_fwd_qrexec", *commons, "admin", *(f"admin.{m}" for m in modules)}
    assert not others & (_SLOW | {"dataclasses", "ipaddress", "json", "pathlib", "subprocess"})


def test_list_imports_nothing_that_only_other_commands_need(lab: LabDirectory) -> None:
    ours, others = _imported("--lab", str(lab.root), "list")
    runs = {name: command.runs.partition(".")[0] for name, command in cli.parser.COMMANDS.items()}
    assert {module for module in runs.values() if f"admin.views.{module}" in ours} == {runs["list"]}
    assert not others & _SLOW


def test_dom0_imports_nothing_but_the_standard_library_and_this_package(lab: LabDirectory) -> None:
    code = (
        "import sys\n"
        "from qubes_fwd_qrexec.admin.views import cli\n"
        "from qubes_fwd_qrexec.admin.views import changes, exchange, tunnels\n"
        "from qubes_fwd_qrexec.admin.views import applying, complete, showing\n"
        "from qubes_fwd_qrexec.admin import watch\n"
        "from qubes_fwd_qrexec.admin.qubes import events\n"
        "import qubes_fwd_qrexec.lab.changes\n"
        "import qubes_fwd_qrexec.common.rulexml\n"
        f"for line in {list(map(list, _EVERY_COMMAND))!r}: cli.main(['--lab', {str(lab.root)!r}, *line])\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "names -= set(sys.stdlib_module_names) | {'__main__', 'qubes_fwd_qrexec'}\n"
        "print(sorted(name for name in names if not name.startswith('_')), file=sys.stderr)\n"
    )
    # -S: no site-packages, whose .pth files may import what they like.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        text=True,
        capture_output=True,
        check=False,
        timeout=BOUND_S,
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_a_reader_that_has_seen_enough_is_no_error(lab: LabDirectory) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "qubes_fwd_qrexec.admin.views.cli", "policy"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "QVM_FORWARD_LAB": str(lab.root)},
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=BOUND_S,
    )
    os.close(write_end)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", ">&- <&-"])
@pytest.mark.parametrize("command", [("list",), ADD, ("policy", "--json"), ("__complete", "1", "")])
def test_what_cannot_be_printed_is_said_after_it_was_done(
    lab: LabDirectory, redirection: str, command: tuple[str, ...]
) -> None:
    """Nobody is refused for it: who closes everything need not read what is said of it."""
    line = shlex.join([sys.executable, "-m", "qubes_fwd_qrexec.admin.views.cli", *command])
    done = subprocess.run(
        ["sh", "-c", f"exec {line} {redirection}"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "QVM_FORWARD_LAB": str(lab.root)},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=BOUND_S,
    )
    why = "No space left on device" if "full" in redirection else "it is closed"
    told = f"qvm-forward: the output could not be written: {why}\n"
    assert (done.returncode, done.stderr) == (1, told)
    assert ("forward.web" in lab.features("work")) == (command is ADD)


@pytest.mark.parametrize(
    ("environ", "is_coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_a_terminal_gets_colours_unless_it_says_that_it_wants_none(
    lab: LabDirectory, environ: dict[str, str], is_coloured: bool
) -> None:
    lab.set_feature("work", "forward.bad", "nonsense")
    outer, inner = os.openpty()
    given = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM", "COLUMNS")}
    # What it prints fits into the terminal's buffer, so nobody needs to read meanwhile.
    done = subprocess.run(
        [sys.executable, "-m", "qubes_fwd_qrexec.admin.views.cli", "list"],
        env=given | {"PYTHONPATH": str(ROOT), "QVM_FORWARD_LAB": str(lab.root)} | environ,
        stdout=inner,
        stderr=subprocess.PIPE,
        check=False,
        timeout=BOUND_S,
    )
    assert select.select([outer], [], [], BOUND_S)[0]
    printed = os.read(outer, 65536)
    os.close(outer), os.close(inner)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"broken" in printed
    assert (b"\x1b[" in printed) == is_coloured


def test_an_interrupt_before_it_has_begun_ends_it_without_a_traceback() -> None:
    code = (
        "import sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'argparse': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from qubes_fwd_qrexec.admin.views.program import main\n"
        "sys.exit(main())"
    )
    words = [sys.executable, "-c", code, "list"]
    done = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False, timeout=BOUND_S
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"qvm-forward: interrupted\n")


def test_an_interrupt_ends_it_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupt)
    assert cli.main(["list"]) == 130


def test_no_trace_reaches_a_user_but_the_one_who_asks(
    lab: LabDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a\x1b[1m\nb")

    monkeypatch.setattr(locate, "open_backend", fail)
    assert cli.main(["list"]) == 3
    said = capsys.readouterr().err
    assert said.startswith("qvm-forward: this is a bug in qvm-forward (KeyError: 'a\\x1b[1m\\nb'); ")
    assert "Traceback" not in said
    monkeypatch.setenv("QVM_FORWARD_TRACE", "1")
    assert cli.main(["list"]) == 3
    assert capsys.readouterr().err.startswith("Traceback (most recent call last):\n")


def test_what_the_operating_system_refuses_has_its_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(locate, "open_backend", refuse)
    assert cli.main(["list"]) == 1
    assert capsys.readouterr().err == "qvm-forward list: /somewhere: Permission denied\n"
