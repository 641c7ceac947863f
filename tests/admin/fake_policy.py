# SPDX-License-Identifier: GPL-2.0-or-later
"""Qubes' Python package qrexec at the level of calls, over a lab's directory: policy, and what it answers.

Beside `fake_admin`; test_fake_admin.py holds the answers against recorded ones.
"""

import hashlib
import logging
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from qubes_fwd_qrexec.admin.backend import ANY, NEW
from qubes_fwd_qrexec.lab.directory import LabDirectory, write_text
from qubes_fwd_qrexec.lab.evaluator import Allow, Deny, Domain, Request, System
from qubes_fwd_qrexec.lab.policytext import PolicyTextError, parse_policy
from qubes_fwd_qrexec.lab.verdicts import OwnJudge
from qubes_fwd_qrexec.lab.view import qube_uuid


def unexpected(what: object) -> NoReturn:
    pytest.fail(f"not what a Qubes system is asked: {what}")


# qrexec/policy/admin.py.
class PolicyAdminException(Exception):  # noqa: N818
    pass


class PolicyAdminTokenException(PolicyAdminException):
    pass


class PolicyAdminFileNotFoundException(PolicyAdminException):
    pass


class PolicyAdminSyntaxException(PolicyAdminException):
    pass


class FakePolicyClient:
    """`qrexec.policy.admin_client.PolicyClient` over the lab's policy directory.

    ``is_old`` is the client before April 2026, whose errors have what was printed. ``fails`` may raise first.
    """

    def __init__(self, lab: LabDirectory) -> None:
        self._directory = lab.policy_dir
        self.is_old = False
        self.fails: Callable[[str], None] = lambda method: None

    def _path(self, name: str) -> Path:
        if name != "30-forward":
            unexpected(f"policy file {name}")
        return self._directory / f"{name}.policy"

    def _error(self, error: PolicyAdminException) -> Exception:
        said = f"{error}\n".encode()
        return subprocess.CalledProcessError(1, "qrexec-client", said) if self.is_old else error

    def policy_list(self) -> list[str]:
        self.fails("policy.List")
        # Of no files the real client makes one without a name.
        return sorted(path.stem for path in self._directory.glob("*.policy")) or [""]

    def policy_get(self, name: str) -> tuple[str, str]:
        self.fails("policy.Get")
        path = self._path(name)
        if not path.exists():
            raise self._error(PolicyAdminFileNotFoundException(f"Not found: {path}"))
        data = path.read_bytes()
        return data.decode(), _token(data)

    def policy_replace(self, name: str, content: str, token: str) -> None:
        self.fails("policy.Replace")
        path = self._path(name)
        if token == NEW:
            if path.exists():
                raise self._error(PolicyAdminTokenException("File exists but token is 'new'"))
        elif token == ANY:
            pass
        elif not token.startswith("sha256:"):
            unexpected(f"token {token}")
        elif not path.exists():
            raise self._error(PolicyAdminTokenException("File doesn't exist, but token isn't 'new'"))
        elif token != _token(path.read_bytes()):
            raise self._error(PolicyAdminTokenException("Token mismatch"))
        try:
            # The whole directory as it would be: the file that is replaced is not read.
            for other in sorted(self._directory.glob("*.policy")):
                if other != path:
                    parse_policy(other.read_text(), str(other))
            parse_policy(content, str(path))
        except PolicyTextError as error:
            text = f"Policy change validation failed: {error}"
            raise self._error(PolicyAdminSyntaxException(text)) from error
        write_text(path, content)


def _token(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


# qrexec/exc.py.
class AccessDenied(Exception):  # noqa: N818
    notify = False


# qrexec/policy/parser.py.
class AllowResolution:
    user, autostart, notify = None, False, False

    def __init__(self, target: str) -> None:
        self.target = target


class AskResolution:
    pass


class FakeParser:
    """`qrexec.policy.parser` and `qrexec.utils` over the lab's qubes, judged by the lab's evaluator."""

    def __init__(self, lab: LabDirectory) -> None:
        self._lab = lab

    def get_system_info(self) -> dict[str, dict[str, Any]]:
        domains = {}
        for name, qube in self._lab.qubes().items():
            uuid = qube_uuid(name)
            domains[name] = domains[f"uuid:{uuid}"] = {
                "name": name,
                "uuid": uuid,
                "type": str(qube.klass),
                "power_state": str(qube.state),
            }
        return {"domains": domains}

    def request(self, *call: str, system_info: dict[str, Any]) -> tuple[Request, dict[str, Any]]:
        service, argument, source, target = call
        request = Request(service=service, argument=argument, source=source, target=target)
        return request, system_info["domains"]

    def load(self, policy_path: Path | None = None) -> SimpleNamespace:
        """`FilePolicy`, which reads the whole policy when it is made, and warns of a file of Qubes itself."""
        logging.warning("warning: !compat-4.0 directive in file 35-compat.policy line 16 is transitional")
        try:
            judge = OwnJudge().load(self._lab.policy_dir)
        except PolicyTextError as error:
            raise AccessDenied(str(error)) from error
        return SimpleNamespace(evaluate=partial(self.evaluate, judge))

    def evaluate(self, judge: OwnJudge, asked: tuple[Request, dict[str, Any]]) -> object:
        request, domains = asked
        system = System(
            {
                name: Domain(
                    name=name,
                    klass=info["type"],
                    uuid=info["uuid"],
                    is_running=info["power_state"] == "Running",
                )
                for name, info in domains.items()
                if not name.startswith("uuid:")
            }
        )
        found = judge.judge(system, request)
        if isinstance(found, Deny):
            raise AccessDenied(found.reason)
        return AllowResolution(found.target) if isinstance(found, Allow) else AskResolution()

    def modules(self) -> dict[str, dict[str, Any]]:
        return {
            "qrexec.exc": {"AccessDenied": AccessDenied},
            "qrexec.utils": {"get_system_info": self.get_system_info},
            "qrexec.policy.parser": {
                "AllowResolution": AllowResolution,
                "AskResolution": AskResolution,
                "Request": self.request,
                "FilePolicy": self.load,
            },
        }
