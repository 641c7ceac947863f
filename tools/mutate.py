# SPDX-License-Identifier: GPL-2.0-or-later
"""Change the code in one place at a time, and see whether the tests of that file notice.

    .venv/bin/python tools/mutate.py [--count N] [--seconds S] [--seed N] [--jobs N] [FOLDER or FILE...]

Places are drawn at random, the same ones for the same seed and code; Cosmic Ray makes the changes. Each is
judged in a copy of the sources by the tests of the same folder: first those that mirror its file, and then
those that import it. What no test notices is printed as a difference, unless tests/equivalent-mutants says
why nobody can. Exit status 1: fewer than 95 % were noticed.
"""

import argparse
import ast
import difflib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).parent.parent
PACKAGE = "qubes_fwd_qrexec"
PLACES = ["mux", "relay", "common", "admin"]
# What only shows is held by tests of its words, which a changed number rarely reaches.
LEFT_OUT = "admin/views/"
EQUIVALENT = ROOT / "tests" / "equivalent-mutants"
WANTED_SHARE = 0.95
# Those that a slip of the hand makes. Cosmic Ray has more, whose changes fail wherever the line runs at all.
OPERATORS = [
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_GtE", "LtE_Gt", "Gt_LtE", "GtE_Lt")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_FloorDiv", "FloorDiv_Mul")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("BitOr_BitAnd", "BitAnd_BitOr", "LShift_RShift")),
    *(f"ReplaceUnaryOperator_{pair}" for pair in ("USub_UAdd", "Delete_Not", "Delete_Invert")),
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ExceptionReplacer", "NumberReplacer"),
    "ZeroIterationForLoop",
]
Span = tuple[tuple[int, int], tuple[int, int]]


class Mutant(NamedTuple):
    """The ``occurrence``-th place in a file that an operator can change."""

    file: str
    operator: str
    occurrence: int
    span: Span


class Verdict(NamedTuple):
    mutant: Mutant
    difference: str
    killed_by: str
    """Empty if nobody noticed."""


def tracked(*places: str) -> list[str]:
    command = ["git", "ls-files", "--", *places]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def sources(places: list[str]) -> list[str]:
    found = tracked(*(place if place.startswith(PACKAGE) else f"{PACKAGE}/{place}" for place in places))
    return [
        file
        for file in found
        if file.endswith(".py")
        and not file.endswith("__init__.py")
        and not file.startswith(f"{PACKAGE}/{LEFT_OUT}")
    ]


def left_alone(text: str) -> Iterator[Span]:
    """What a change says nothing of: annotations, constants that are measured, and what never runs."""
    for node in ast.walk(ast.parse(text)):
        found: list[ast.expr | ast.stmt | None] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found = [node.returns]
        elif isinstance(node, ast.arg | ast.AnnAssign):
            found = [node.annotation]
        elif isinstance(node, ast.If):
            found = [node] if re.search("TYPE_CHECKING|__name__", ast.unparse(node.test)) else []
        elif isinstance(node, ast.Call):
            found = [node] if ast.unparse(node.func) in {"dataclass", "TypeVar"} else []
        elif isinstance(node, ast.Assign) and all(isinstance(name, ast.Name) for name in node.targets):
            is_constant = ast.unparse(node.targets[0]).isupper()
            is_type = isinstance(node.value, ast.BinOp) and ast.unparse(node.targets[0]).istitle()
            found = [node] if is_constant or is_type else []
        for one in found:
            if one is not None:
                yield (one.lineno, one.col_offset), (one.end_lineno or one.lineno, one.end_col_offset or 0)


def mutants_of(file: str) -> list[Mutant]:
    text = (ROOT / file).read_text(encoding="utf-8")
    alone = list(left_alone(text))
    nodes = list(ast_nodes(get_ast(text)))
    found = []
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        spans = [tuple(span[:2]) for node in nodes for span in operator.mutation_positions(node)]
        found += [
            Mutant(file, name, occurrence, span)
            for occurrence, span in enumerate(spans)
            if not any(begin <= span[0] and span[1] <= end for begin, end in alone)
        ]
    return found


def drawn(files: list[str], count: int, chance: random.Random) -> list[Mutant]:
    """One mutant at each of so many places."""
    by_place: dict[tuple[str, Span], list[Mutant]] = defaultdict(list)
    for file in files:
        for mutant in mutants_of(file):
            by_place[file, mutant.span].append(mutant)
    places = chance.sample(sorted(by_place), min(count, len(by_place)))
    return [chance.choice(by_place[place]) for place in places]


def tests_of(file: str) -> list[str]:
    """All of the same folder: first those that mirror the file, and then those that import it."""
    path = Path(file)
    folder = str(Path("tests", *path.parts[1:-1]))
    tests = [test for test in tracked(folder) if re.search(r"/test_\w+\.py$", test)]
    mirror = [test for test in tests if re.search(rf"/test_{path.stem}(_\w+)?\.py$", test)]
    module = ".".join(path.with_suffix("").parts)
    parent, _, name = module.rpartition(".")
    imports = re.compile(
        rf"(^from {re.escape(module)} import |^import {re.escape(module)}\b"
        rf"|^from {re.escape(parent)} import (\([^)]*\b{name}\b|.*\b{name}\b))",
        re.MULTILINE,
    )
    names = set(re.findall(r"^(?:class|def) (\w+)", (ROOT / file).read_text(), re.MULTILINE))
    others = []
    for test in tests:
        text = (ROOT / test).read_text(encoding="utf-8")
        by_package = re.search(rf"^from {re.escape(parent)} import ([^(\n]+|\([^)]*)", text, re.MULTILINE)
        is_by_package = by_package is not None and names & set(re.findall(r"\w+", by_package[1]))
        if test not in mirror and (imports.search(text) or is_by_package):
            others.append(test)
    found = mirror + others
    return found + [test for test in tests if test not in found]


class Copy:
    """The sources in a directory of their own, where one mutant at a time lives."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for file in tracked():
            if (ROOT / file).is_file():
                (directory / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, directory / file)

    def write(self, file: str, text: str) -> None:
        path = self.directory / file
        path.write_text(text, encoding="utf-8")
        # Python looks at seconds and sizes alone, and a mutant has both in common with the last one.
        for old in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            old.unlink()

    def test(self, tests: list[str], bound_s: float) -> str:
        """What failed, or an empty text."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            *tests,
        ]
        environ = os.environ | {"PYTHONPATH": str(self.directory), "CI": "true"}
        with subprocess.Popen(
            command,
            cwd=self.directory,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(timeout=bound_s)
            except subprocess.TimeoutExpired:
                return f"no end within {bound_s:.0f} s"
            finally:
                _end(process.pid)
        if process.returncode == 0:
            return ""
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        return failed[1] if failed else said.strip().rpartition("\n")[2]


def _end(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


class Judge:
    """Judges mutants, each in one of so many copies."""

    def __init__(self, jobs: int, directory: Path, ends_at: float) -> None:
        self.ends_at = ends_at
        self._copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(jobs):
            self._copies.put(Copy(directory / str(number)))
        self._bounds: dict[frozenset[str], float] = {}
        self._one_bound_at_a_time = threading.Lock()

    def judge(self, mutant: Mutant) -> Verdict | None:
        """None when the time is over."""
        if time.monotonic() > self.ends_at:
            return None
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        changed = mutate_code(text, get_operator(f"core/{mutant.operator}")(), mutant.occurrence)
        tests = tests_of(mutant.file)
        copy = self._copies.get()
        try:
            bound_s = self._bound(copy, tests)
            copy.write(mutant.file, changed)
            killed_by = copy.test(tests, bound_s) if tests else ""
        finally:
            copy.write(mutant.file, text)
            self._copies.put(copy)
        lines = difflib.unified_diff(
            text.splitlines(), changed.splitlines(), mutant.file, mutant.operator, lineterm="", n=1
        )
        return Verdict(mutant, "\n".join(lines), killed_by)

    def _bound(self, copy: Copy, tests: list[str]) -> float:
        """How long the tests may take; they pass in a fraction of it as long as nothing is changed."""
        with self._one_bound_at_a_time:
            if (together := frozenset(tests)) not in self._bounds:
                began = time.monotonic()
                if problem := copy.test(tests, 1200):
                    raise SystemExit(f"the tests fail as it is: {problem}")
                self._bounds[together] = 30 + 5 * (time.monotonic() - began)
            return self._bounds[together]


def known() -> dict[str, str]:
    """The changed line of each mutant that nobody can notice, after its file, and why."""
    found = {}
    for line in EQUIVALENT.read_text(encoding="utf-8").splitlines() if EQUIVALENT.exists() else ():
        if line and not line.startswith("#"):
            what, _, why = line.partition("  # ")
            found[what.strip()] = why
    return found


def name_of(verdict: Verdict) -> str:
    """As tests/equivalent-mutants names it."""
    added = [line[1:].strip() for line in verdict.difference.splitlines()[2:] if line.startswith("+")]
    return f"{verdict.mutant.file}: {' '.join(added)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("places", nargs="*", default=PLACES, help="folders or files below the package")
    parser.add_argument("--count", type=int, default=200, help="how many mutants")
    parser.add_argument("--seconds", type=float, default=3600, help="how long to go on at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    chance = random.Random(options.seed)  # noqa: S311
    mutants = drawn(sources(options.places or PLACES), options.count, chance)
    equivalent = known()
    killed, excused, survived = 0, 0, []
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as directory,
        ThreadPoolExecutor(options.jobs) as threads,
    ):
        judge = Judge(options.jobs, Path(directory), time.monotonic() + options.seconds)
        for verdict in threads.map(judge.judge, mutants):
            if verdict is None:
                continue
            name = name_of(verdict)
            if verdict.killed_by:
                killed += 1
                print(f"killed    {name}  by {verdict.killed_by}", flush=True)
            elif name in equivalent:
                excused += 1
                print(f"the same  {name}  # {equivalent[name]}", flush=True)
            else:
                survived.append(verdict)
                print(f"SURVIVED  {name}", flush=True)
    judged = killed + len(survived)
    for verdict in survived:
        print(f"\n{verdict.difference}")
    share = killed / judged if judged else 0.0
    print(
        f"\n{killed} of {judged} mutants killed, {share:.0%}; {excused} more change nothing to be seen, "
        f"and for {len(mutants) - judged - excused} the time was over (seed {options.seed})"
    )
    return 0 if share >= WANTED_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
