# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab and the command qvm-forward on it."""

import io
from pathlib import Path

import pytest
from worlds import NOW, Command, Result

from qubes_fwd_qrexec.admin.cli import run
from qubes_fwd_qrexec.admin.tables import Style
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.directory import LabDirectory


@pytest.fixture
def lab(tmp_path: Path) -> LabDirectory:
    return create_lab(tmp_path / "lab")


@pytest.fixture
def forward(lab: LabDirectory) -> Command:
    """Run qvm-forward on the lab at a fixed time."""

    def command(
        *argv: str, now: float = NOW, stdin: str = "", style: Style | None = None, lab_dir: Path | None = None
    ) -> Result:
        out, err = io.StringIO(), io.StringIO()
        environ = {"QVM_FORWARD_LAB": str(lab_dir or lab.root)}
        status = run(
            argv,
            environ=environ,
            now=now,
            stdin=io.StringIO(stdin),
            out=out,
            err=err,
            style=style or Style(),
        )
        return Result(status, out.getvalue(), err.getvalue())

    return command
