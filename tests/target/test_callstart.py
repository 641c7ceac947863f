# SPDX-License-Identifier: GPL-2.0-or-later
"""When dom0 said yes: when the agent's process began, and never when our service did."""

import socket
import subprocess
import time

import pytest
from agents import agent_process
from noted import after_a_tick

from qubes_fwd_qrexec.target import callstart
from qubes_fwd_qrexec.target.callstart import CallStartError, agent_pid, boot_ticks, call_start


def test_it_is_the_start_of_the_agents_process_by_two_clocks() -> None:
    before, before_s = boot_ticks(), time.monotonic()
    with agent_process() as pid:
        after, after_s = boot_ticks(), time.monotonic()
        after_a_tick()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            start = call_start(pid, ours)
    tick_s = 1 / callstart.TICKS_PER_S
    assert before <= start.boot_ticks <= after
    assert before_s - tick_s <= start.monotonic_s <= after_s


@pytest.mark.parametrize("text", ["", "x", "-1", "01", "1 ", "\u0661", "9" * 40])
def test_an_agent_that_is_not_named_is_no_agent(text: str) -> None:
    with pytest.raises(CallStartError, match="QREXEC_AGENT_PID"):
        agent_pid(text)


def test_the_agent_is_named_by_its_number() -> None:
    assert agent_pid("4711") == 4711


def test_an_agent_that_is_gone_or_hidden_is_an_error() -> None:
    with subprocess.Popen(["true"]) as gone:
        pid = gone.pid
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(CallStartError, match="hidepid"):
        call_start(pid, ours)


def test_once_the_call_is_over_the_pid_is_not_trusted() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with agent_process() as pid, ours, pytest.raises(CallStartError, match="the call is over"):
        call_start(pid, ours)


def test_a_caller_that_has_sent_everything_is_still_there() -> None:
    ours, theirs = socket.socketpair()
    theirs.shutdown(socket.SHUT_WR)
    with agent_process() as pid, ours, theirs:
        assert call_start(pid, ours).boot_ticks <= boot_ticks()
