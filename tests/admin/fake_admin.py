# SPDX-License-Identifier: GPL-2.0-or-later
"""Qubes' Python package qubesadmin at the level of calls, over a lab's directory as a system's state.

Whatever a real qubesd would not be asked fails the test. The answers are held against recorded ones by
test_fake_admin.py. The package qrexec is `fake_policy`.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any, NamedTuple

import fake_exc
import fake_policy
import pytest
from fake_exc import (
    QubesDaemonAccessError,
    QubesDaemonCommunicationError,
    QubesFeatureNotFoundError,
    QubesNoSuchPropertyError,
    QubesPropertyAccessError,
    QubesVMNotFoundError,
    QubesVMNotRunningError,
)
from fake_policy import FakeParser, FakePolicyClient, unexpected
from fake_process import FakeProcess

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory

# docs/facts.md, Q5.
_CALLS_MAX = 9


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


class FakeVM:
    """`qubesadmin.vm.QubesVM`, whose properties are read as qubesadmin/base.py does."""

    def __init__(self, app: "FakeApp", name: str, klass: str, state: str | None) -> None:
        self._app = app
        self.name = name
        self.klass = klass
        self._state = state
        self._known: dict[str, Any] = {}
        self.features = FakeFeatures(app, name)

    @property
    def tags(self) -> Iterator[str]:
        return iter(self._app.qubesd_call(self.name, "admin.vm.tag.List").decode().splitlines())

    def get_power_state(self) -> str:
        if self._state is None:
            unexpected("a call for each state")
        return self._state

    def __getattr__(self, item: str) -> Any:
        if item.startswith("_"):
            raise AttributeError(item)
        if not self._app.cache_enabled:
            unexpected("a call for each property")
        if not self._known:
            with suppress(QubesDaemonAccessError):
                answer = self._app.qubesd_call(self.name, "admin.vm.property.GetAll")
                for line in answer.splitlines():
                    name, value = line.split(b" ", 1)
                    self._known[name.decode()] = self._value(value)
        if self._known:
            value = self._known.get(item, AttributeError)
        else:
            try:
                value = self._value(self._app.qubesd_call(self.name, "admin.vm.property.Get", item))
            except (QubesDaemonAccessError, QubesVMNotFoundError):
                raise QubesPropertyAccessError(item) from None
        if value is AttributeError:
            raise AttributeError(item)
        return value

    def _value(self, answer: bytes) -> Any:
        default, kind, value = answer.split(b" ", 2)
        assert default.startswith(b"default=")
        text = value.decode()
        if kind == b"type=vm":
            return self._app.domains.get_blind(text) if text else None
        if kind == b"type=bool":
            return text == "True" if text else AttributeError
        if kind == b"type=label":
            return FakeLabel(text) if text else None
        if kind in (b"type=str", b"type=int"):
            return text
        raise QubesDaemonCommunicationError(f"Received invalid value type: {kind!r}")


class FakeLabel(NamedTuple):
    """`qubesadmin.label.Label`, whose other attributes are a call each."""

    name: str

    def __str__(self) -> str:
        return self.name


class FakeFeatures:
    """qubesadmin/features.py."""

    def __init__(self, app: "FakeApp", name: str) -> None:
        self._app = app
        self._name = name

    def __iter__(self) -> Iterator[str]:
        return iter(self._app.qubesd_call(self._name, "admin.vm.feature.List").decode().splitlines())

    def get(self, key: str) -> str | None:
        try:
            return self._app.qubesd_call(self._name, "admin.vm.feature.Get", key).decode()
        except KeyError:
            return None

    def __setitem__(self, key: str, value: str) -> None:
        self._app.qubesd_call(self._name, "admin.vm.feature.Set", key, value.encode())

    def __delitem__(self, key: str) -> None:
        self._app.qubesd_call(self._name, "admin.vm.feature.Remove", key)


class FakeDomains:
    """`qubesadmin.app.VMCollection`."""

    def __init__(self, app: "FakeApp") -> None:
        self._app = app
        self._listed: dict[str, dict[str, str]] = {}
        self._objects: dict[str, FakeVM] = {}

    def _list(self) -> dict[str, dict[str, str]]:
        if not self._listed:
            for line in self._app.qubesd_call("dom0", "admin.vm.List").splitlines():
                name, words = line.decode("ascii").split(" ", 1)
                # A word without "=" is a ValueError there too.
                self._listed[name] = dict(word.split("=", 1) for word in words.split(" "))
        return self._listed

    def __contains__(self, name: str) -> bool:
        return name in self._list()

    def values(self) -> list[FakeVM]:
        return [self.get_blind(name) for name in self._list()]

    def get_blind(self, name: str) -> FakeVM:
        if name not in self._objects:
            listed = self._listed.get(name)
            klass = listed["class"] if listed else "not asked for"
            state = listed.get("state") if listed and self._app.cache_enabled else None
            self._objects[name] = FakeVM(self._app, name, klass, state)
        return self._objects[name]


class FakeApp:
    """What ``qubesadmin.Qubes()`` makes. What it has cached stays as it was."""

    def __init__(self, qubesd: "FakeQubes") -> None:
        self.qubesd_connection_type = qubesd.connection
        self.local_name = qubesd.name
        self.cache_enabled = False
        self.qubesd_call = qubesd.qubesd_call
        self.run_service = qubesd.run_service
        self.domains = FakeDomains(self)


class FakeQubes:
    """The system. ``fails`` may raise, or give an answer, in the place of a call's own."""

    def __init__(self, lab: LabDirectory, *, connection: str = "socket", name: str = "dom0") -> None:
        self.lab = lab
        self.root = Path("/nowhere")
        """Of the file system that the program sees."""
        self.connection = connection
        self.name = name
        self.calls: list[Called] = []
        self.services: list[tuple[str, str]] = []
        self.status: int | None = 0
        self.says: dict[tuple[str, str], bytes] = {}
        """What qubes answer to which calls; they lack every other service."""
        self.process: FakeProcess | None = None
        """The last call's."""
        self.processes: list[FakeProcess] = []
        self.started: SimpleQueue[FakeProcess] = SimpleQueue()
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
        if not self.lab.qube_dir(dest).root.is_dir():
            raise QubesVMNotFoundError(f"No such domain: {dest!r}")
        try:
            return known.answer(self, called).encode()
        except (StoreError, OSError) as error:
            raise empty_answer() from error

    def run_service(
        self, dest: str, service: str, user: str | None = None, *, autostart: bool = True, **popen: int
    ) -> FakeProcess:
        is_cut = service.startswith("qubes.ForwardCut+")
        is_asked = is_cut or service == "qubes.ForwardNft" or service.startswith("qubes.ForwardStatus+")
        expected = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,
            "start_new_session": True,
        }
        is_root = is_cut or service == "qubes.ForwardNft"
        expected_user = None if self.connection != "socket" else "root" if is_root else "user"
        is_known = is_asked or service == "qubes.ForwardRevoke"
        if not is_known or autostart or popen != expected:
            unexpected((dest, service, autostart, popen))
        if user != expected_user:
            unexpected(f"user {user}")
        if not self._is_running(dest):
            raise QubesVMNotRunningError(f"{dest} is not running")
        self.services.append((dest, service))
        if sum(not process.is_closed for process in self.processes) >= _CALLS_MAX:
            unexpected("so many calls at once, of which some would fail")
        if is_asked:
            says = self.says.get((dest, service))
            process = FakeProcess(127 if says is None else self.status, says or b"")
        else:
            answer = b"version=1 ended=1 draining=0\n" if self.status == 0 else b""
            process = FakeProcess(self.status, answer)
        # Calls come from many threads: the last one is for who makes one at a time.
        self.process = process
        self.processes.append(process)
        self.started.put(process)
        return process

    def _is_running(self, name: str) -> bool:
        """`QubesVM.is_running`, which takes a qube of which it was told nothing for one that does not run."""
        try:
            return b"power_state=Running" in self.qubesd_call(name, "admin.vm.CurrentState")
        except (QubesDaemonAccessError, QubesVMNotFoundError):
            return False


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


def _state(app: FakeQubes, called: Called) -> str:
    return f"mem=0 mem_static_max=0 cputime=0 power_state={app.lab.qube(called.dest).state}"


def _properties(app: FakeQubes, called: Called) -> str:
    """Some of the forty, in qubesd's order: what is asked for, and what could be mistaken for it."""
    qube = app.lab.qube(called.dest)
    if qube.is_admin:
        lines = ["icon default=True type=str adminvm-black", "label default=False type=label black"]
        lines.append("name default=True type=str dom0")
        lines.append("default_dispvm default=True type=vm ")
        return "".join(f"{line}\n" for line in lines)
    is_template = qube.klass == "TemplateVM"
    default = str(is_template)
    switched = {False: "default=True type=bool False", True: "default=False type=bool True"}
    lines = [
        f"icon default=True type=str {qube.icon}",
        f"ip default={default} type=str {qube.ip or ''}",
        f"ip6 default={default} type=str {qube.ip6 or ''}",
        "kernel default=True type=str 1.0",
        f"label default=False type=label {qube.label}",
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


def _property(app: FakeQubes, called: Called) -> str:
    for line in _properties(app, called).splitlines():
        name, _, value = line.partition(" ")
        if name == called.arg:
            return value
    raise QubesNoSuchPropertyError(f"Invalid property {called.arg!r} of {called.dest}")


def _tags(app: FakeQubes, called: Called) -> str:
    return "".join(f"{tag}\n" for tag in sorted(app.lab.qube(called.dest).tags))


def _features(app: FakeQubes, called: Called) -> str:
    return "".join(f"{key}\n" for key in app.lab.features(called.dest))


def _feature(app: FakeQubes, called: Called) -> str:
    try:
        return (app.lab.qube_dir(called.dest).features / (called.arg or "")).read_text(encoding="utf-8")
    except FileNotFoundError:
        text = f"Feature not set for domain {called.dest}: {called.arg}"
        raise QubesFeatureNotFoundError(text) from None
    except UnicodeDecodeError as error:
        raise StoreError(str(error)) from error


def _set(app: FakeQubes, called: Called) -> str:
    app.lab.set_feature(called.dest, called.arg or "", (called.payload or b"").decode("ascii"))
    return ""


def _remove(app: FakeQubes, called: Called) -> str:
    _feature(app, called)
    app.lab.remove_feature(called.dest, called.arg or "")
    return ""


METHODS = {
    "admin.vm.List": Method(False, False, True, _list),
    "admin.vm.CurrentState": Method(False, False, False, _state),
    "admin.vm.property.GetAll": Method(False, False, False, _properties),
    "admin.vm.property.Get": Method(True, False, False, _property),
    "admin.vm.tag.List": Method(False, False, False, _tags),
    "admin.vm.feature.List": Method(False, False, False, _features),
    "admin.vm.feature.Get": Method(True, False, False, _feature),
    "admin.vm.feature.Set": Method(True, True, False, _set),
    "admin.vm.feature.Remove": Method(True, False, False, _remove),
}


def install(monkeypatch: pytest.MonkeyPatch, app: FakeQubes, client: FakePolicyClient) -> None:
    """Make both packages importable; what they are not to be used for is not in them."""
    of_qubes = {name: one for name, one in vars(fake_exc).items() if isinstance(one, type)}
    of_policy = {name: one for name, one in vars(fake_policy).items() if name.startswith("PolicyAdmin")}
    modules = {
        "qubesadmin": {"Qubes": lambda: FakeApp(app)},
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
