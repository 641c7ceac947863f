# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab that runs inside a trio program, for tests and for short-lived commands: on loopback, no daemon."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qubes_fwd_qrexec.common.values import QubeName

from .blueprint import create_lab
from .broker import Broker, open_broker
from .directory import LabDirectory, write_text
from .places import Loopback
from .verdicts import Judge, best_judge
from .view import LabView


class RunningLab:
    """A lab whose broker runs in this process."""

    def __init__(self, lab: LabDirectory, broker: Broker) -> None:
        self.directory = lab
        self.broker = broker

    def client_command(self, qube: str) -> list[str]:
        """The ``qrexec-client-vm`` of a qube, as a command to which options and the call are added."""
        return client_command(self.directory, qube)

    def write_policy(self, text: str, name: str = "30-forward.policy") -> None:
        """Replace one policy file; it holds from the next call on."""
        write_text(self.directory.policy_dir / name, text)

    def turn(self, **knobs: Any) -> None:
        """Set knobs, by the names and types of `Knobs`; they hold from the next call on."""
        with self.directory.locked():
            self.directory.write_knobs(replace(self.directory.knobs(), **knobs))

    def drop_calls(self, share: float = 1.0, target: str | None = None) -> int:
        """Lose the vchans of a share of the joined calls, the oldest first, and return how many."""
        return self.broker.drop(share, target)


@asynccontextmanager
async def open_lab(
    path: str | os.PathLike[str], *, policy: str | None = None, judge: Judge | None = None
) -> AsyncIterator[RunningLab]:
    """Run the lab at ``path``, which is made if nothing is there; calls are taken within the block.

    ``policy`` becomes 30-forward.policy. Raises `StoreError`.
    """
    lab = _open_or_create(Path(path))
    view = LabView(lab, judge or best_judge())
    async with open_broker(view, Loopback()) as broker:
        running = RunningLab(lab, broker)
        if policy is not None:
            running.write_policy(policy)
        yield running


def _open_or_create(root: Path) -> LabDirectory:
    is_new = not root.exists() or not any(root.iterdir())
    return create_lab(root) if is_new else LabDirectory.open(root)


def client_command(lab: LabDirectory, qube: str) -> list[str]:
    """The stand-in for ``qrexec-client-vm`` in a qube; raises `StoreError` if there is no such qube."""
    name: QubeName = lab.qube(qube).name
    return [str(lab.client_program), f"--agent-socket={lab.qube_dir(name).agent_socket}"]
