# SPDX-License-Identifier: GPL-2.0-or-later
"""The soft limit of open files becomes the hard one, in a process of its own."""

import resource
import subprocess
import sys

from bounds import BOUND_S

_PROGRAM = (
    "import resource; from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit; "
    "print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
)


def test_the_soft_limit_becomes_the_hard_one() -> None:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512))

    found = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        preexec_fn=lower,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=True,
    )
    assert found.stdout.split() == ["512", "512", "512"]
