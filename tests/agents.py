# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes in the place of the agent's for one call: all that matters of them is when they began."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def agent_process() -> Iterator[int]:
    """The number of a process that begins now, and ends with the block."""
    # Nobody's child: tests count those of their own.
    command = ["/bin/sh", "-c", "exec 3<&0; cat <&3 >/dev/null & echo $!"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        yield int(shell.stdout.readline())
