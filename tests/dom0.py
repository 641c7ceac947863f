# SPDX-License-Identifier: GPL-2.0-or-later
"""qvm-forward on a lab in this process, where it starts in a tenth of what a program of its own takes."""

import io
import time

import schema

from qubes_fwd_qrexec.admin.views import cli
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.lab.directory import LabDirectory


def run(lab: LabDirectory, *words: str, now: float | None = None) -> tuple[int, str]:
    """The exit status and what is printed; ``now`` is the time for it, else what it is."""
    out, err = io.StringIO(), io.StringIO()
    status = cli.run(
        words,
        environ={"QVM_FORWARD_LAB": str(lab.root)},
        now=time.time() if now is None else now,
        stdin=io.StringIO(),
        out=out,
        err=err,
        style=Style(),
    )
    schema.check(words, out.getvalue())
    return status, out.getvalue() + err.getvalue()


def forward(lab: LabDirectory, *words: str) -> str:
    """A command that must not fail; what it prints."""
    status, text = run(lab, *words)
    assert status == 0, text
    return text
