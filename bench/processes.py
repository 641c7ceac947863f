# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that the bench started: controlled by lines of JSON, and ended without touching any other."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

# How long a process may take to end when asked, before it is killed.
_END_S = 5.0
_ANSWER_MAX = 64 * 1024 * 1024
_LOG_LINES = 10


class BenchError(Exception):
    """Something to be measured does not work; the text says what."""


class Child:
    """A process in a group of its own, so that what it forks ends with it. Its stderr goes to a file."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        self._received = b""
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                start_new_session=True,
            )

    @classmethod
    def of_module(cls, module: str, arguments: Sequence[str], log_dir: Path) -> Self:
        """Run a Python module with the interpreter that runs now."""
        return cls(module, [sys.executable, "-m", module, *arguments], log_dir / f"{module}.log")

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self, within_s: float = 0.0) -> bool:
        """Whether it is over, or is so within a time."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        return self._process.returncode is not None

    def ask(self, order: Mapping[str, Any], within_s: float) -> dict[str, Any]:
        """Send one order and read its answer. Raises `BenchError`, also when the answer is an error."""
        self.send(order)
        answer = self.answer(within_s)
        if "error" in answer:
            raise BenchError(str(answer["error"]))
        return answer

    def send(self, order: Mapping[str, Any]) -> None:
        """Send one order; `answer` is due for it. Raises `BenchError`."""
        if self._process.stdin is None:
            raise BenchError(f"{self.name}: takes no orders")
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
        except OSError as error:
            raise self.failure("takes no order") from error

    def answer(self, within_s: float) -> dict[str, Any]:
        """The next line of its output. Raises `BenchError`."""
        if self._process.stdout is None:
            raise BenchError(f"{self.name}: has no output")
        deadline = time.monotonic() + within_s
        fd = self._process.stdout.fileno()
        while b"\n" not in self._received:
            readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise self.failure(f"no answer within {within_s:g} s")
            data = os.read(fd, 1 << 20)
            if not data or len(self._received) > _ANSWER_MAX:
                raise self.failure("ended without an answer")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def failure(self, what: str) -> BenchError:
        """An error with the end of the process's log."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        return BenchError("\n    ".join([f"{self.name}: {what}", *lines]))

    def end(self) -> None:
        """End it and what it has forked: asked twice (the second time means at once), then killed."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            self._signal(number)
            if self.has_ended(_END_S / 5 if number == signal.SIGTERM else _END_S):
                break
        self._signal(signal.SIGKILL)  # what was forked and did not end with its parent
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
