# SPDX-License-Identifier: GPL-2.0-or-later
"""How many calls of qubesd and of the policy API a command makes, by the Admin API of the tests."""

import io
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qubes_fwd_qrexec.admin.qubes.store import QubesStore
from qubes_fwd_qrexec.admin.views import cli
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.lab.directory import LabDirectory

_TESTS = Path(__file__).parent.parent / "tests"


class System:
    """A lab as a Qubes system, asked within this process."""

    def __init__(self, qubesd: Any, policy: list[str], root: Path) -> None:
        self._qubesd = qubesd
        self._policy = policy
        self._root = root

    def calls(self, *argv: str, stdin: str = "") -> Mapping[str, int]:
        """Those of a command, by whom it asks. Raises `RuntimeError` if it fails."""
        self._qubesd.calls.clear()
        self._policy.clear()
        out, err = io.StringIO(), io.StringIO()
        status = cli.run(
            argv,
            environ={},
            now=time.time(),
            stdin=io.StringIO(stdin),
            out=out,
            err=err,
            style=Style(),
            backend=QubesStore(self._root),
        )
        if status != 0:
            raise RuntimeError(f"qvm-forward {' '.join(argv)}: {err.getvalue()}")
        return {"qubesd": len(self._qubesd.calls), "policy": len(self._policy)}


@contextmanager
def open_system(lab: LabDirectory, root: Path) -> Iterator[System]:
    """The lab as the Qubes system that this machine is dom0 of; ``root`` is an empty directory."""
    sys.path[:0] = [str(_TESTS / "admin"), str(_TESTS)]
    import pytest
    from fake_admin import FakeQubes, install
    from fake_policy import FakePolicyClient

    (root / "run/qubes").mkdir(parents=True)
    qubesd, client, policy = FakeQubes(lab), FakePolicyClient(lab), list[str]()
    client.fails = policy.append
    with pytest.MonkeyPatch.context() as patch:
        install(patch, qubesd, client)
        yield System(qubesd, policy, root)
