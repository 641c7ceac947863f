# SPDX-License-Identifier: GPL-2.0-or-later
"""Qubes' Python package qubesadmin at the level of calls, over a lab's directory as a system's state.

Whatever a real qubesd would not be asked fails the test. The answers are held against recorded ones by
test_fake_admin.py. The package qrexec is `fake_policy`.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from tempfile import TemporaryFile
from types import ModuleType
from typing import IO, NamedTuple

import fake_policy
import pytest
from fake_policy import FakeParser, FakePolicyClient, unexpected

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory


# qubesadmin/exc.py: the names and which is which; the last two are no QubesException there.
class QubesException(Exception):  # noqa: N818
    pass


class QubesVMNotFoundError(QubesException, KeyError):
    __str__ = Exception.__str__


class QubesFeatureNotFoundError(QubesException, KeyError):
    __str__ = Exception.__str__


class QubesVMNotRunningError(QubesException):
    pass


class QubesDaemonCommunicationError(QubesException):
    pass


class QubesDaemonAccessError(QubesDaemonCommunicationError):
    pass


class ProtocolError(AssertionError):
    pass


class PermissionDenied(Exception):  # noqa: N818
    pass


class Called(NamedTuple):
    dest: str
    method: str
    arg: str | None
    payload: bytes | None


class Method(NamedTuple):
    has_arg: bool
    has_payload: bool
    is_for_dom0_alone: bool
    answer: Callable[["FakeQubes", Called], str]


class FakeProcess:
    """A call's process: ``status`` is how it will end, None for never; ``says`` stands in its output."""

    def __init__(self, status: int | None, says: bytes | None = None, *, is_given: bool = False) -> None:
        self._status = status
        self.log: list[str] = []
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        self._given: IO[bytes] | None = None
        self.given = b""
        if is_given:
            given_fd, stdin_fd = os.pipe()
            self._given, self.stdin = os.fdopen(given_fd, "rb"), os.fdopen(stdin_fd, "wb")
        if says is not None:
            self.stdout = TemporaryFile()  # noqa: SIM115  # whoever reads it closes it
            self.stdout.write(says)
            self.stdout.seek(0)

    def wait(self, timeout: float | None = None) -> int:
        self.log.append("wait")
        if self._given is not None and not self._given.closed:
            with self._given:
                self.given = self._given.read()
        if self._status is None:
            if timeout is None:
                unexpected("to wait for ever")
            raise subprocess.TimeoutExpired("qrexec-client", timeout)
        return self._status

    def kill(self) -> None:
        self.log.append("kill")
        self._status = -9


class FakeQubes:
    """`qubesadmin.Qubes`. ``fails`` may raise, or give an answer, in the place of a call's own."""

    def __init__(self, lab: LabDirectory, *, connection: str = "socket", name: str = "dom0") -> None:
        self.lab = lab
        self.qubesd_connection_type = connection
        self.local_name = name
        self.calls: list[Called] = []
        self.services: list[tuple[str, str]] = []
        self.status: int | None = 0
        self.says: dict[tuple[str, str], bytes] = {}
        """What qubes answer to which calls; they lack every other service."""
        self.process: FakeProcess | None = None
        self.fails: Callable[[Called], bytes | None] = lambda called: None

    def qubesd_call(
        self, dest: str, method: str, arg: str | None = None, payload: bytes | None = None
    ) -> bytes:
        called = Called(dest, method, arg, payload)
        self.calls.append(called)
        known = METHODS.get(method)
        if (
            known is None
            or (arg is not None) != known.has_arg
            or (payload is not None) != known.has_payload
            or (known.is_for_dom0_alone and dest != "dom0")
        ):
            unexpected(called)
        instead = self.fails(called)
        if instead is not None:
            return instead
        if dest not in self.lab.qube_names():
            raise QubesVMNotFoundError(f"No such domain: {dest!r}")
        try:
            return known.answer(self, called).encode()
        except (StoreError, OSError) as error:
            raise empty_answer() from error

    def run_service(
        self, dest: str, service: str, user: str | None = None, *, autostart: bool = True, **popen: int
    ) -> FakeProcess:
        is_asked = service.startswith("qubes.ForwardStatus+")
        expected = {
            "stdin": subprocess.DEVNULL if is_asked else subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,
            "start_new_session": True,
        }
        expected_user = "user" if self.qubesd_connection_type == "socket" else None
        is_known = is_asked or service == "qubes.ForwardRevoke"
        if not is_known or autostart or popen != expected:
            unexpected((dest, service, autostart, popen))
        if user != expected_user:
            unexpected(f"user {user}")
        if dest not in self.lab.qube_names() or not self.lab.qube(dest).is_running:
            raise QubesVMNotRunningError(f"{dest} is not running")
        self.services.append((dest, service))
        if is_asked:
            says = self.says.get((dest, service))
            self.process = FakeProcess(127 if says is None else self.status, says or b"")
        else:
            answer = b"version=1 ended=1 draining=0\n" if self.status == 0 else b""
            self.process = FakeProcess(self.status, answer, is_given=True)
        return self.process


def empty_answer() -> QubesDaemonAccessError:
    """What the client makes of a qubesd that failed within."""
    return QubesDaemonAccessError("Got empty response from qubesd. See journalctl in dom0 for details.")


def refused() -> QubesDaemonAccessError:
    """What the client in a management qube makes of a call that policy refuses."""
    return QubesDaemonAccessError("Service call error: Request refused\n")


def _list(app: FakeQubes, called: Called) -> str:
    lines = []
    # qubes/vm/adminvm.py orders dom0 before all others.
    for name in sorted(app.lab.qube_names(), key=lambda name: (name != "dom0", name)):
        qube = app.lab.qube(name)
        lines.append(f"{name} class={qube.klass} state={qube.state} uuid=UUID\n")
    return "".join(lines)


def _properties(app: FakeQubes, called: Called) -> str:
    """Some of the forty, in qubesd's order: what is asked for, and what could be mistaken for it."""
    qube = app.lab.qube(called.dest)
    if qube.is_admin:
        lines = ["label default=False type=label black", "name default=True type=str dom0"]
        lines.append("default_dispvm default=True type=vm ")
        return "".join(f"{line}\n" for line in lines)
    is_template = qube.klass == "TemplateVM"
    default = str(is_template)
    switched = {False: "default=True type=bool False", True: "default=False type=bool True"}
    lines = [
        f"ip default={default} type=str {qube.ip or ''}",
        f"ip6 default={default} type=str {qube.ip6 or ''}",
        "kernel default=True type=str 1.0",
        f"name default=False type=str {qube.name}",
        f"provides_network {switched[qube.provides_network]}",
    ]
    if not is_template:
        lines.append(f"template_for_dispvms {switched[qube.template_for_dispvms]}")
        lines.append(f"visible_ip default=True type=str {qube.ip or ''}")
    lines.append("kernelopts default=True type=str swiotlb=2048")
    lines.append(f"netvm default=False type=vm {qube.netvm or ''}")
    if not is_template:
        lines.append(f"template default=False type=vm {qube.template or ''}")
    return "".join(f"{line}\n" for line in lines)


def _tags(app: FakeQubes, called: Called) -> str:
    return "".join(f"{tag}\n" for tag in sorted(app.lab.qube(called.dest).tags))


def _features(app: FakeQubes, called: Called) -> str:
    return "".join(f"{key}\n" for key in app.lab.features(called.dest))


def _feature(app: FakeQubes, called: Called) -> str:
    value = app.lab.features(called.dest).get(called.arg or "")
    if value is None:
        raise QubesFeatureNotFoundError(f"Feature not set for domain {called.dest}: {called.arg}")
    return value


def _set(app: FakeQubes, called: Called) -> str:
    app.lab.set_feature(called.dest, called.arg or "", (called.payload or b"").decode("ascii"))
    return ""


def _remove(app: FakeQubes, called: Called) -> str:
    _feature(app, called)
    app.lab.remove_feature(called.dest, called.arg or "")
    return ""


METHODS = {
    "admin.vm.List": Method(False, False, True, _list),
    "admin.vm.property.GetAll": Method(False, False, False, _properties),
    "admin.vm.tag.List": Method(False, False, False, _tags),
    "admin.vm.feature.List": Method(False, False, False, _features),
    "admin.vm.feature.Get": Method(True, False, False, _feature),
    "admin.vm.feature.Set": Method(True, True, False, _set),
    "admin.vm.feature.Remove": Method(True, False, False, _remove),
}


def install(monkeypatch: pytest.MonkeyPatch, app: FakeQubes, client: FakePolicyClient) -> None:
    """Make both packages importable; what they are not to be used for is not in them."""
    of_qubes = {
        name: one
        for name, one in globals().items()
        if isinstance(one, type) and issubclass(one, Exception) and one.__module__ == __name__
    }
    of_policy = {name: one for name, one in vars(fake_policy).items() if name.startswith("PolicyAdmin")}
    modules = {
        "qubesadmin": {"Qubes": lambda: app},
        "qubesadmin.exc": of_qubes,
        "qrexec": {},
        "qrexec.policy": {},
        "qrexec.policy.admin_client": {"PolicyClient": lambda: client, **of_policy},
        **FakeParser(app.lab).modules(),
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
