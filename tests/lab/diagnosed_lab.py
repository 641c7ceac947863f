# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab with a forward to a server in work, whose way is walked by diagnose."""

import json
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dom0
from bounds import BOUND_S
from helpers import free_port

from qubes_fwd_qrexec.common.report import Firewall, FirewallReport, dump
from qubes_fwd_qrexec.common.services import STATUS_SERVICE
from qubes_fwd_qrexec.lab.session import LabSession

NOW = 1_800_000_000
ALL = [
    *("rule", "exposed qube", "applied", "listener", "firewall", "policy"),
    *("target", "service", "server", "round trip"),
]


class Lab:
    """A lab with a forward to a server in work, and a listener in sys-net that is started when asked for."""

    def __init__(self, session: LabSession, undo: ExitStack) -> None:
        self.session = session
        self.lab = session.lab
        self._undo = undo
        self.server = undo.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.server.settimeout(BOUND_S)
        self.port = free_port()

    def run(self, *words: str) -> tuple[int, str]:
        return dom0.run(self.lab, *words, now=NOW)

    def add(self, *options: str) -> None:
        ports = f"{self.port}:{self.server.getsockname()[1]}"
        words = ("add", "work", ports, "--from=any", "--listen=127.0.0.1", "--name=web", *options)
        status, said = self.run(*words)
        assert status == 0, said

    def listen(self) -> None:
        self.session.start_listener("sys-net")

    def pass_through(self) -> None:
        """One connection all the way, so that a trial need not wait for a mux call's programs to start."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=BOUND_S) as client:
            far, _ = self.server.accept()
            with far:
                far.sendall(b"x")
                assert client.recv(1) == b"x"

    def diagnose(self) -> list[dict[str, Any]]:
        """The steps; where one stops it is the last, with a cause and a remedy. The text says the same."""
        status, said = self.run("diagnose", "work", "web", "--json")
        data = json.loads(said)
        steps: list[dict[str, Any]] = data["steps"]
        assert [step["step"] for step in steps] == ALL[: len(steps)]
        stopping = [step for step in steps if step["verdict"] == "stops"]
        assert data["is_well"] == (not stopping) == (status == 0)
        assert stopping in ([], steps[-1:])
        for step in steps:
            assert bool(step["remedy"]) == bool(step["cause"]) == (step["verdict"] == "stops")
            assert all("'" + " ".join(words) + "'" in step["remedy"] for words in step["ways_out"])
        return steps

    def wrong(self, step: str) -> str:
        """What the last step says, which must be the one that stops."""
        found = self.diagnose()[-1]
        assert (found["step"], found["verdict"]) == (step, "stops"), found
        return f"{found['text']} | {found['remedy']}"

    def service(self, qube: str, name: str) -> Path:
        """Where another service takes the place of the installed one."""
        return self.lab.qube_dir(qube).service_dirs[0] / name

    def remove_service(self, qube: str, name: str) -> None:
        for directory in self.lab.qube_dir(qube).service_dirs:
            (directory / name).unlink(missing_ok=True)

    def firewall(self, ip: Firewall, ip6: Firewall, *waiting: str) -> None:
        """What the program that opens the firewall of sys-net says."""
        state = self.lab.qube_dir("sys-net").firewall_state
        state.parent.mkdir(exist_ok=True)
        state.write_bytes(dump(FirewallReport(ip, ip6, waiting).as_json()))

    def answers(self, qube: str, said: bytes) -> None:
        path = self.service(qube, STATUS_SERVICE)
        answer = path.with_name("answer")
        answer.write_bytes(said)
        path.write_text(f"#!/bin/sh\nexec cat {answer}\n")
        path.chmod(0o755)
