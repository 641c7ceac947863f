# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of docs/guide, played on a lab: `play` gives a chapter back with what they really print.

A block of kind ``console`` shows commands after ``$`` and what they print. A command may fail only where the
sentence before its block says that it is refused. After ``$ qvm-forward watch`` blocks with commands
and blocks with what `watch` prints then take turns, to the end of the chapter. A comment
``<!-- lab: ... -->`` prepares what the reader's system has: by Qubes' own tools, one in each line, or by
``later`` and ``fresh``, which let time pass and make another system.

    python tests/guide.py       write what is printed into the chapters; git diff shows what changed
"""

import io
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "admin"))

from stages import Stage
from worlds import NOW

from qubes_fwd_qrexec.admin.views.cli import run
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.admin.views.times import parse_expire
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.cli import main as lab_command
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore

GUIDE = Path(__file__).parents[1] / "docs" / "guide"
_STEP = re.compile(
    r"^```console\n(?P<block>.*?)^```$|^<!-- lab:\s(?P<lab>.*?)\s-->$", re.MULTILINE | re.DOTALL
)
_PROMPT = "$ "
_MAY_FAIL = re.compile(r"\brefuse[sd]?\b")


class GuideError(Exception):
    """A chapter shows what cannot be: the place, and why."""


def chapters() -> list[Path]:
    return sorted(path for path in GUIDE.glob("*.md") if path.name != "README.md")


@contextmanager
def _utc() -> Iterator[None]:
    """The guide's reader lives in Greenwich, wherever its test is run."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "UTC"
    time.tzset()
    try:
        yield
    finally:
        del os.environ["TZ"]
        if before is not None:
            os.environ["TZ"] = before
        time.tzset()


def play(text: str, home: Path) -> str:
    """The chapter, with what its commands print on a fresh lab in the directory ``home``."""
    with _utc(), chdir(home), ExitStack() as watching:
        return _Chapter(text, home / "lab", watching).play()


class _Chapter:
    """One chapter that is played; ``_written`` is what has become of its text so far."""

    def __init__(self, text: str, lab: Path, watching: ExitStack) -> None:
        self._text = text
        self._watching = watching
        self._lab = self._fresh(lab)
        self._now = float(NOW)
        self._steps = list(_STEP.finditer(text))
        self._printed: dict[int, str] = {}

    def play(self) -> str:
        for index, step in enumerate(self._steps):
            if step["lab"] is None and step["block"].startswith(f"{_PROMPT}qvm-forward watch\n"):
                self._watch(index)
                break
            self._do(index)
        parts, end = [], 0
        for index, step in enumerate(self._steps):
            if index in self._printed:
                parts += [self._text[end : step.start("block")], self._printed[index]]
                end = step.end("block")
        return "".join((*parts, self._text[end:]))

    def _do(self, index: int) -> None:
        step = self._steps[index]
        if step["lab"] is not None:
            for line in step["lab"].strip().splitlines():
                self._change_lab(shlex.split(line))
            return
        commands = _commands(step["block"])
        if not commands:
            raise GuideError(f"{self._place(index)}: a block without a command")
        parts = []
        for command in commands:
            status, printed = self._run(shlex.split(command.replace("\\\n", " ")))
            before = self._text[: step.start()].rstrip().rpartition("\n\n")[2]
            if status != 0 and not _MAY_FAIL.search(before):
                raise GuideError(f"{self._place(index)}: {command!r} fails: {printed}")
            parts.append(f"{_PROMPT}{command}\n{printed}")
        self._printed[index] = "".join(parts)

    def _watch(self, first: int) -> None:
        """Each act is played when `watch` has nothing left to do, and what it printed then is kept."""
        acts = range(first + 1, len(self._steps), 2)
        stage = Stage(self._lab)
        stage.hands.wall = self._now
        pieces: list[str] = []

        def keep() -> None:
            pieces.append(stage.out.getvalue() + stage.err.getvalue())
            stage.out.truncate(0), stage.out.seek(0)

        def act(index: int) -> Callable[[], None]:
            def do() -> None:
                keep()
                self._do(index)

            return do

        stage.run(*map(act, acts))
        keep()
        self._printed[first] = f"{_PROMPT}qvm-forward watch\n{pieces[0]}"
        for index, piece in zip(acts, pieces[1:], strict=True):
            said = self._steps[index + 1]["block"] if index + 1 < len(self._steps) else None
            if said is None or _commands(said):
                raise GuideError(f"{self._place(index)}: what does watch say then?")
            self._printed[index + 1] = piece

    def _place(self, index: int) -> str:
        return f"line {self._text.count(chr(10), 0, self._steps[index].start()) + 1}"

    def _run(self, words: Sequence[str]) -> tuple[int, str]:
        """One command of a terminal in dom0: the exit status, and what is to be seen."""
        out, err = io.StringIO(), io.StringIO()
        file = None
        if ">" in words:
            *words, _, file = words
        if words[0] == "qvm-forward":
            environ = {"QVM_FORWARD_LAB": str(self._lab.root)}
            given = {"environ": environ, "now": self._now, "stdin": io.StringIO(), "style": Style(120)}
            status = run(words[1:], out=out, err=err, **given)  # type: ignore[arg-type]
        elif words == ["sudo", "systemctl", "enable", "--now", "qubes-forward-watch"]:
            status = 0
        elif words[0].startswith("qvm-"):
            return self._tool(words[0].removeprefix("qvm-"), words[1:])
        else:
            raise GuideError(f"this command is not known: {shlex.join(words)}")
        if file is None:
            return status, out.getvalue() + err.getvalue()
        Path(file).write_text(out.getvalue())
        return status, err.getvalue()

    def _change_lab(self, words: Sequence[str]) -> None:
        match words:
            case ["later", distance]:
                self._now = float(parse_expire(distance, self._now) or 0)
            case ["fresh", name]:
                self._lab = self._fresh(Path(name).absolute())
            case [tool, *rest] if tool.startswith("qvm-"):
                status, printed = self._tool(tool.removeprefix("qvm-"), rest)
                if status != 0:
                    raise GuideError(f"the lab cannot do this: {shlex.join(words)}: {printed}")
            case _:
                raise GuideError(f"the lab cannot do this: {shlex.join(words)}")

    def _tool(self, name: str, words: Sequence[str]) -> tuple[int, str]:
        """One of Qubes' own tools, which ``qvm-forward-lab`` has under its own name."""
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            try:
                status = lab_command(["--lab", str(self._lab.root), name, *words])
            except SystemExit as error:
                raise GuideError(f"this command is not known: qvm-{name} {shlex.join(words)}") from error
        return status, said.getvalue()

    def _fresh(self, place: Path) -> LabDirectory:
        lab = create_lab(place)
        # As in dom0, where the package has started it.
        self._watching.enter_context(LabStore(lab).watching())
        return lab


def _commands(block: str) -> list[str]:
    """The commands of a block, each with its line ends."""
    found: list[str] = []
    for line in block.splitlines():
        if line.startswith(_PROMPT):
            found.append(line.removeprefix(_PROMPT))
        elif found and found[-1].endswith("\\"):
            found[-1] += f"\n{line}"
    return found


def main() -> None:
    for path in chapters():
        with tempfile.TemporaryDirectory() as home:
            try:
                path.write_text(play(path.read_text(), Path(home)))
            except GuideError as error:
                sys.exit(f"{path}: {error}")


if __name__ == "__main__":
    main()
