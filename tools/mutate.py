# SPDX-License-Identifier: GPL-2.0-or-later
"""Change the code in one place at a time, and see whether the tests of that folder notice.

    .venv/bin/python tools/mutate.py [--count N] [--skip N] [--seconds S] [--seed N] [--jobs N] [--only TEXT]
        [FOLDER or FILE...]

Places are drawn by a hash of the seed and their line, so that an edit elsewhere leaves the others drawn;
Cosmic Ray makes the changes. Each is judged in a copy of the sources: first by the tests that mirror its
file, then by the others of the folder, and last by those that try many examples. The first that fails ends
it, and so does one that takes longer than TEST_BOUND_S. What no test notices is printed as a difference,
unless tests/equivalent-mutants says why nobody can. Each verdict is printed as it falls: after an
interruption, --skip goes on. Exit status 1: fewer than 95 % were noticed.
"""

import argparse
import ast
import difflib
import hashlib
import linecache
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import pytest
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
# Longer than any test waits, BOUND_S in tests/helpers.py.
TEST_BOUND_S = 90
FEW_EXAMPLES, MANY_EXAMPLES = "not hypothesis", "hypothesis"
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
    before: str
    after: str
    killed_by: str
    """Empty if nobody noticed."""

    @property
    def difference(self) -> str:
        files = self.mutant.file, self.mutant.operator
        return "\n".join(
            difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), *files, lineterm="", n=1)
        )

    @property
    def name(self) -> str:
        """As tests/equivalent-mutants names it: by its lines, which stay as the code around them moves."""
        lines = self.difference.splitlines()[2:]
        old, new = (" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
        return f"{self.mutant.file}: {old}  ->  {new}"


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
    """What no test can or should hold.

    Annotations, types and the options of dataclasses change nothing that runs; constants in capitals are
    measured and not promised; and what stands under TYPE_CHECKING or __name__ does not run in tests. No
    operator changes a string, so docstrings, __all__ and messages are left alone anyway.
    """
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


def line_of(mutant: Mutant) -> str:
    return linecache.getline(str(ROOT / mutant.file), mutant.span[0][0])


def mutants_of(file: str) -> list[Mutant]:
    text = (ROOT / file).read_text(encoding="utf-8")
    alone = list(left_alone(text))
    nodes = list(ast_nodes(get_ast(text)))
    found = []
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        spans = [tuple(span[:2]) for node in nodes for span in operator.mutation_positions(node)]
        for occurrence, span in enumerate(spans):
            mutant = Mutant(file, name, occurrence, span)
            is_alone = any(begin <= span[0] and span[1] <= end for begin, end in alone)
            # Cosmic Ray takes the star before keyword-only parameters for an operator.
            if not is_alone and not line_of(mutant)[span[0][1] :].startswith("*,"):
                found.append(mutant)
    return found


def drawn(files: list[str], seed: int) -> Iterator[Mutant]:
    """One mutant at each place, in the order of the seed."""
    places: dict[bytes, list[Mutant]] = {}
    for file in files:
        by_span: dict[Span, list[Mutant]] = defaultdict(list)
        for mutant in mutants_of(file):
            by_span[mutant.span].append(mutant)
        seen: Counter[str] = Counter()
        for span in sorted(by_span):
            (_, begin), (_, end) = span
            place = f"{seed} {file} {begin} {end} {line_of(by_span[span][0])}"
            seen[place] += 1
            places[hashlib.sha256(f"{place} {seen[place]}".encode()).digest()] = by_span[span]
    for digest, mutants in sorted(places.items()):
        yield mutants[digest[-1] % len(mutants)]


def stages(file: str) -> list[tuple[list[str], str]]:
    """The tests of a file's folder, those first that are likely to notice a change of the file."""
    path = Path(file)
    tests = [
        test for test in tracked(str(Path("tests", *path.parts[1:-1]))) if re.search(r"/test_\w+\.py$", test)
    ]
    mirror = [test for test in tests if re.search(rf"/test_{path.stem}(_\w+)?\.py$", test)]
    others = [test for test in tests if test not in mirror]
    others.sort(
        key=lambda test: not re.search(rf"\b{path.stem}\b", (ROOT / test).read_text(encoding="utf-8"))
    )
    found = [(mirror, FEW_EXAMPLES), (others, FEW_EXAMPLES), (mirror + others, MANY_EXAMPLES)]
    return [(files, which) for files, which in found if files]


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

    def test(self, tests: list[str], which: str, bound_s: float) -> str:
        """What failed, or an empty text."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "--tb=no",
            "-p",
            "no:cacheprovider",
        ]
        command += ["-o", f"faulthandler_timeout={TEST_BOUND_S}", "-o", "faulthandler_exit_on_timeout=true"]
        command += ["--hypothesis-profile=mutants", "-m", which, *tests]
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
        if process.returncode in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
            return ""
        if f"Timeout (0:{TEST_BOUND_S // 60:02}:" in said:
            return f"a test that took more than {TEST_BOUND_S} s"
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
        self._bounds: dict[str, float] = {}

    def judge(self, mutant: Mutant) -> Verdict | None:
        """None when the time is over."""
        if time.monotonic() > self.ends_at:
            return None
        copy = self._copies.get()
        text = (copy.directory / mutant.file).read_text(encoding="utf-8")
        changed = mutate_code(text, get_operator(f"core/{mutant.operator}")(), mutant.occurrence)
        bound_s = self._bounds[str(Path(mutant.file).parent)]
        try:
            copy.write(mutant.file, changed)
            by_stage = (copy.test(tests, which, bound_s) for tests, which in stages(mutant.file))
            killed_by = next(filter(None, by_stage), "")
        finally:
            copy.write(mutant.file, text)
            self._copies.put(copy)
        return Verdict(mutant, text, changed, killed_by)

    def check(self, folder: str) -> None:
        """Its tests pass as long as nothing is changed, and a stage may take twice as long as all of them."""
        copy = self._copies.get()
        began = time.monotonic()
        for tests, which in stages(f"{folder}/__init__.py"):
            if problem := copy.test(tests, which, 3600):
                raise SystemExit(f"the tests fail as it is: {problem}")
        self._bounds[folder] = 2 * TEST_BOUND_S + 2 * (time.monotonic() - began)
        self._copies.put(copy)


def known() -> dict[str, str]:
    """Each mutant that nobody can notice, and why."""
    found = {}
    for line in EQUIVALENT.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, why = line.partition("  # ")
            found[name] = why
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("places", nargs="*", default=PLACES, help="folders or files below the package")
    parser.add_argument("--count", type=int, default=200, help="how many mutants")
    parser.add_argument("--skip", type=int, default=0, help="how many of them are judged already")
    parser.add_argument("--seconds", type=float, default=3600, help="how long to go on at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2 * (os.cpu_count() or 1))
    parser.add_argument("--only", default="", metavar="TEXT", help="those whose line has this text")
    options = parser.parse_args()
    all_of_them = drawn(sources(options.places or PLACES), options.seed)
    wanted = (mutant for mutant in all_of_them if options.only in line_of(mutant))
    mutants = list(islice(wanted, options.skip, options.count))
    equivalent = known()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    survived = []
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as directory,
        ThreadPoolExecutor(options.jobs) as threads,
    ):
        judge = Judge(options.jobs, Path(directory), time.monotonic() + options.seconds)
        for _ in threads.map(judge.check, {str(Path(mutant.file).parent) for mutant in mutants}):
            pass
        for done in as_completed([threads.submit(judge.judge, mutant) for mutant in mutants]):
            if (verdict := done.result()) is None:
                continue
            if verdict.killed_by:
                said, why = "killed", f"by {verdict.killed_by}"
            elif verdict.name in equivalent:
                said, why = "the same", f"# {equivalent[verdict.name]}"
            else:
                said, why = "SURVIVED", ""
                survived.append(verdict)
            counts[verdict.mutant.file.split("/")[1]][said] += 1
            print(f"{said}  {verdict.name}  {why}", flush=True)
    for verdict in survived:
        print(f"\n{verdict.difference}")
    print()
    for folder, count in sorted(counts.items()):
        print(f"{folder}: {summary(count)}")
    total = sum(counts.values(), Counter())
    late = len(mutants) - total.total()
    print(f"all: {summary(total)}; for {late} more the time was over (seed {options.seed})")
    return 0 if total["killed"] >= WANTED_SHARE * (total["killed"] + total["SURVIVED"]) else 1


def summary(count: Counter[str]) -> str:
    judged = count["killed"] + count["SURVIVED"]
    share = f", {count['killed'] / judged:.1%}" if judged else ""
    return f"{count['killed']} of {judged} killed{share}; {count['the same']} more change nothing to be seen"


if __name__ == "__main__":
    sys.exit(main())
