# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the programs in the qubes."""

import gc
import logging
import math
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from agents import agent_process, close_connector, renew_connector
from helpers import BOUND_S, listening_socket, no_fds_left, reserved_ports
from hypothesis import HealthCheck, Phase, settings
from mux_bench import Joined, MuxBench
from single_calls import ByHandover, ByProgram
from wired import Wired, open_wired

from qubes_fwd_qrexec.exposed import flowpool, statussockets, trial
from qubes_fwd_qrexec.lab.stockrules import Shape
from qubes_fwd_qrexec.relay import flowqueue
from qubes_fwd_qrexec.system import bugs, logs

# argparse asks gettext for each of its words, and there is no translation to look for in four places.
os.environ["LANGUAGE"] = "C"

# How long an example takes says something of the machine's other load alone. Where a change is judged, the
# examples are the same each time; elsewhere chance looks for others. They are half as many as Hypothesis
# would make, as drawing a rule takes longer than judging it.
settings.register_profile(
    "ours",
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
    database=None if "CI" in os.environ else settings.default.database,
)
settings.load_profile("ours")
# For tools/mutate.py, which asks whether an example fails and not which is the smallest.
settings.register_profile("mutants", max_examples=100, phases=[Phase.explicit, Phase.generate])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let go of what a failed test had in its hands: its open sockets would fail the test after it."""
    report = yield
    if call.excinfo is not None and not item.config.getoption("usepdb"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            _clear_frames(call.excinfo.value)
    return report


def _clear_frames(error: BaseException | None) -> None:
    """Of the error, of those in its group, and of those that it came from."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        for frame, _ in traceback.walk_tb(error.__traceback__):
            frame.f_locals  # noqa: B018  Python before 3.13 brings its copy of them up to date then
        if isinstance(error, BaseExceptionGroup):
            for part in error.exceptions:
                _clear_frames(part)
        error = error.__context__


# Those at the end of a run would have one process busy while the others have nothing left to do.
_LONGEST = ("test_soak.py", "test_commands.py", "test_bench.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first. Of them and all others the garbage collector has nothing to collect any more."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)
    gc.freeze()


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pytest's own has the test's name in it, and below it a UNIX socket's path would be too long."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """A program's ``main`` takes over the log of its process, which here is that of all tests."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def bugs_are_wanted() -> None:
    """The test makes some; `_no_bugs` has nothing against them."""


# Of the 300 s that a call may wait at most.
_YOUNG_S = 30.0


class _Noted(logging.Handler):
    """Keeps the exceptions that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.bugs: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None and record.exc_info[1] is not None:
            self.bugs.append(record.exc_info[1])


@pytest.fixture(autouse=True)
def _no_bugs(request: pytest.FixtureRequest) -> Iterator[None]:
    """A program goes on after a bug. A test does not: what was raised in this process fails it."""
    noted, logger = _Noted(), logging.getLogger(bugs.__name__)
    logger.addHandler(noted)
    yield
    logger.removeHandler(noted)
    if noted.bugs and "bugs_are_wanted" not in request.fixturenames:
        raise noted.bugs[0]


@pytest.fixture(autouse=True)
def _free_ports() -> Iterator[None]:
    """What `free_port` has given to a test is nobody else's until it is over."""
    with reserved_ports():
        yield


class _Agent:
    """The agent's process for a call, which dom0 allowed a moment ago: a service takes no old one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self._process = ExitStack()
        self._began_at = -math.inf

    def be_young(self) -> None:
        if time.monotonic() - self._began_at > _YOUNG_S:
            self.end()
            self._began_at = time.monotonic()
            self._patch.setenv("QREXEC_AGENT_PID", str(self._process.enter_context(agent_process())))
            renew_connector()

    def end(self) -> None:
        self._process.close()
        close_connector()


@pytest.fixture(autouse=True, scope="session")
def _agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Agent]:
    """What a service finds in a qube: who calls, the agent's process for it, and where its note goes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QREXEC_REMOTE_DOMAIN", "sys-net")
        patch.setenv("QUBES_FORWARD_RUN_DIR", str(tmp_path_factory.mktemp("target") / "run"))
        agent = _Agent(patch)
        agent.be_young()
        yield agent
        agent.end()


@pytest.fixture(autouse=True)
def _called_by_an_agent(_agent: _Agent) -> None:
    """Of each test: the whole suite takes longer than a call may wait before its service begins."""
    _agent.be_young()


@pytest.fixture
def mux_call_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same for this test alone: a lease begins with the agent's process."""
    with agent_process() as pid:
        monkeypatch.setenv("QREXEC_REMOTE_DOMAIN", "sys-net")
        monkeypatch.setenv("QUBES_FORWARD_RUN_DIR", str(tmp_path / "run"))
        monkeypatch.setenv("QREXEC_AGENT_PID", str(pid))
        yield


@pytest.fixture
def said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a test takes, a kind of event that was logged is not logged again."""
    monkeypatch.setattr(logs, "REPEAT_S", 1e6)


@pytest.fixture
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a busy machine takes to begin a call, or to give this process its turn, no datagram is
    dropped for that."""
    monkeypatch.setattr(flowpool, "WAIT_S", 1e6)
    monkeypatch.setattr(flowqueue, "WAIT_S", 1e6)


@pytest.fixture
def long_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial has as much time as a busy machine takes for it."""
    monkeypatch.setattr(trial.try_out, "__defaults__", (BOUND_S,))
    monkeypatch.setattr(statussockets, "_PATIENCE_S", BOUND_S)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where mux calls leave their notes; it is not there yet."""
    return tmp_path / "notes"


@pytest.fixture
def shape() -> Shape:
    """Whose rules the qubes of `fresh` have; a test that is parametrized by ``shape`` says which."""
    return Shape.R4_3


@pytest.fixture
def has_ipv6() -> bool:
    """Whether the qubes of `fresh` have IPv6; a test that is parametrized by ``has_ipv6`` says."""
    return True


@pytest.fixture
def has_vpn() -> bool:
    """Whether there is a VPN qube in `fresh`; a test that is parametrized by ``has_vpn`` says."""
    return False


@pytest.fixture
def fresh(tmp_path: Path, shape: Shape, has_ipv6: bool, has_vpn: bool) -> Iterator[Wired]:
    """A path of qubes joined by IP for this test alone."""
    with open_wired(tmp_path / "lab", shape, has_ipv6=has_ipv6, has_vpn=has_vpn) as wired:
        yield wired


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A listening, non-blocking TCP socket: the server in the target."""
    with listening_socket() as sock:
        yield sock


@pytest.fixture(params=["program", "handover"])
def single_calls(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ByProgram]:
    """Each of the two ways in which a target serves calls for one connection."""
    with ExitStack() as undo:
        yield ByProgram(undo) if request.param == "program" else ByHandover(undo, tmp_path, monkeypatch)


@pytest.fixture
def name_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes what the target's owner says of its servers; the file."""
    path = tmp_path / "servers.conf"
    monkeypatch.setenv("QUBES_FORWARD_SERVERS", str(path))

    def write(text: str) -> Path:
        path.write_text(text)
        return path

    return write


@pytest.fixture
def unix_server() -> Iterator[socket.socket]:
    """A listening, non-blocking UNIX socket: the server in the target."""
    with TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        sock.bind(f"{directory}/web.sock")
        sock.listen()
        yield sock


@pytest.fixture
def bench() -> Iterator[MuxBench]:
    """Both ends of a mux call, which leave no descriptor behind."""
    with no_fds_left(), MuxBench() as bench:
        yield bench


@pytest.fixture
def stream(bench: MuxBench) -> Joined:
    """One stream of that mux call."""
    return bench.join()
