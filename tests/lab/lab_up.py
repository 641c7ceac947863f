# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab that is up, as its tests use it."""

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable

from bounds import BOUND_S

from qubes_fwd_qrexec.lab import daemon
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.running import client_command


def call(
    lab: LabDirectory, service: str = "test.Service", target: str = "work", **options: object
) -> subprocess.CompletedProcess[bytes]:
    command = [*client_command(lab, "sys-net"), target, service]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=BOUND_S, check=False
    )


def kill_broker(lab: LabDirectory, pid: int) -> None:
    """Kill it, and wait until it is gone."""
    broker = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(broker, signal.SIGKILL)
        assert select.select([broker], [], [], BOUND_S)[0]
    finally:
        os.close(broker)
    assert daemon.broker_pid(lab) is None


def becomes(condition: Callable[[], bool]) -> None:
    """Wait until it comes true, within the bound; each look starts a program."""
    until_s = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < until_s
