# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker as a background process: how to start it, find it and stop it.

The process that runs the broker holds an flock on the pid file. So a reused process id is never taken for a
broker, and what a killed broker left behind is removed by the next one.
"""

import fcntl
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from pathlib import Path

import trio

from qubes_fwd_qrexec.common.errors import ForwardError, RefusedError, StoreError, leaves
from qubes_fwd_qrexec.common.values import QubeName

from . import netns
from .broker import open_broker
from .control import serve_control
from .directory import LabDirectory, write_text
from .inhabitants import end_inhabitants
from .interrupts import deferred_signals, ended_by_signals, ignore_signals
from .places import Loopback, Places
from .store import LabStore
from .switches import Switches
from .units import search_path
from .verdicts import best_judge
from .view import LabView
from .wires import Wires

_log = logging.getLogger("qubes_fwd_qrexec.lab")
_READY = b"ready"
_UP_TIMEOUT_S = 60.0
_DOWN_TIMEOUT_S = 60.0
_POLL_S = 0.02
_DIRECTORY_S = 0.5
_LOCK_PATIENCE_S = 1.0
_LOG_BYTES_MAX = 10_000_000


class Network(StrEnum):
    """What the user asked for; ``auto`` means namespaces where they are available."""

    AUTO = "auto"
    NAMESPACES = "namespaces"
    LOOPBACK = "loopback"


def broker_pid(lab: LabDirectory) -> int | None:
    """The process id of the running broker, or None."""
    try:
        with open(lab.pid_file, encoding="ascii") as file:
            if _try_lock(file.fileno()):
                return None
            text = file.read().strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdigit() else None


def start(lab: LabDirectory, network: Network) -> int:
    """Run a broker in the background and return its process id when it takes calls.

    Raises `RefusedError` if one runs already, `StoreError` if it does not come up.
    """
    pid = broker_pid(lab)
    if pid is not None:
        raise RefusedError(f"{lab.root}: is already up (pid {pid}); 'qvm-forward-lab down' ends it")
    lab.run_dir.mkdir(exist_ok=True)
    ready_fd, its_ready_fd = os.pipe()
    with open(ready_fd, "rb") as ready, ExitStack() as undo:
        with deferred_signals():
            try:
                with open(lab.log_file, "ab") as log:
                    if log.tell() > _LOG_BYTES_MAX:
                        log.truncate(0)
                    process = subprocess.Popen(
                        [sys.executable, "-P", "-m", __name__, str(lab.root), network, str(its_ready_fd)],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        pass_fds=[its_ready_fd],
                        start_new_session=True,
                        cwd="/",
                        env=os.environ | {"PYTHONPATH": search_path()},
                    )
            finally:
                os.close(its_ready_fd)
            undo.callback(_give_up, lab, process)
        if not select.select([ready], [], [], _UP_TIMEOUT_S)[0]:
            raise StoreError(
                f"{lab.root}: the broker is not ready after {_UP_TIMEOUT_S:g} s; see {lab.log_file}"
            )
        word = ready.read()
        if word != _READY:
            problem = word.decode(errors="replace")
            raise StoreError(problem or f"the broker failed at once; see {lab.log_file}")
        undo.pop_all()
    # It lives on without us; Popen would warn about that.
    process.returncode = 0
    return process.pid


def _give_up(lab: LabDirectory, process: "subprocess.Popen[bytes]") -> None:
    """End a broker that has not come up, with what it has started, and remove what it has made."""
    ignore_signals()
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_DOWN_TIMEOUT_S)
            break
    stop(lab)


def stop(lab: LabDirectory) -> bool:
    """End the broker and remove what it made; False if none ran. Raises `StoreError` if it does not end."""
    pid = broker_pid(lab)
    if pid is not None:
        _end(pid)
    end_inhabitants(lab.root)
    clean(lab)
    return pid is not None


def clean(lab: LabDirectory) -> None:
    """Remove what a broker leaves behind when it is killed."""
    with suppress(StoreError):  # the directory may be gone
        for name in lab.qube_names():
            lab.qube_dir(name).agent_socket.unlink(missing_ok=True)
    lab.control_socket.unlink(missing_ok=True)
    lab.no_ip_file.unlink(missing_ok=True)
    if netns.why_unavailable() is None:
        netns.destroy(lab)


def _end(pid: int) -> None:
    """Raises `StoreError` if it does not end. It lets go of its lock a moment before it is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                signal.pidfd_send_signal(pidfd, sign)
            except PermissionError:
                raise StoreError(f"the broker (pid {pid}) is another user's: only they can end it") from None
            except ProcessLookupError:
                pass
            if select.select([pidfd], [], [], _DOWN_TIMEOUT_S)[0]:
                return
    finally:
        os.close(pidfd)
    raise StoreError(f"the broker (pid {pid}) does not end")


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _holding_pid_file(lab: LabDirectory) -> Iterator[None]:
    with open(lab.pid_file, "a+", encoding="ascii") as file:
        # Someone who only looks whether we run holds the lock for a moment.
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while not _try_lock(file.fileno()):
            if time.monotonic() >= deadline:
                raise RefusedError(f"{lab.root}: is already up")
            time.sleep(_POLL_S)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
        file.truncate(0)


def _make_namespaces(lab: LabDirectory, network: Network) -> netns.Namespaces | None:
    """Raises `StoreError` if they were asked for and cannot be had."""
    if network is Network.LOOPBACK:
        return None
    problem = netns.why_unavailable()
    if problem is None:
        namespaces = netns.Namespaces(lab, netns.why_no_firewall())
        try:
            namespaces.create()
        except StoreError as error:
            problem = str(error)
        else:
            return namespaces
    if network is Network.NAMESPACES:
        raise StoreError(problem)
    _log.warning("all qubes share this machine's network: %s", problem)
    return None


def _places(lab: LabDirectory, namespaces: netns.Namespaces | None) -> Places:
    if namespaces is None:
        return Loopback()
    if namespaces.why_no_ip is not None:
        _log.warning("no IP between the qubes: %s", namespaces.why_no_ip)
        return namespaces
    return Wires(namespaces, is_tunnel=lambda name: _is_tunnel(lab, name))


def _is_tunnel(lab: LabDirectory, qube: QubeName) -> bool:
    """By the same marks as ``qvm-forward`` knows a VPN qube."""
    return LabStore(lab).inventory().tunnel_mark(qube) is not None


async def _run(lab: LabDirectory, places: Places, ready_fd: int) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        view = LabView(lab, best_judge())
        async with open_broker(view, places) as broker, trio.open_nursery() as nursery:
            switches = Switches(broker)
            await nursery.start(serve_control, broker, switches)
            nursery.start_soon(_end_with_directory, lab, nursery.cancel_scope)
            nursery.start_soon(switches.watch)
            await switches.follow_or_log()
            os.write(ready_fd, _READY)
            os.close(ready_fd)
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()


async def _end_with_directory(lab: LabDirectory, scope: trio.CancelScope) -> None:
    """End the lab when its directory is gone, or another one."""
    here = _identity(lab.root)
    while here is not None and _identity(lab.root) == here and lab.file.exists():  # noqa: ASYNC110
        await trio.sleep(_DIRECTORY_S)
    _log.error("%s: gone", lab.root)
    scope.cancel()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def main(argv: list[str]) -> int:
    """The broker's process, with the arguments LAB NETWORK READY_FD. It writes to READY_FD why it cannot
    start.
    """
    lab, network, ready_fd = LabDirectory.open(argv[1]), Network(argv[2]), int(argv[3])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    # A call takes about eight descriptors here, and a target may have 127 calls.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.set_inheritable(ready_fd, False)
    status = 0
    try:
        with ended_by_signals(), _holding_pid_file(lab):
            clean(lab)
            namespaces = _make_namespaces(lab, network)
            try:
                places = _places(lab, namespaces)
                if places.why_no_ip is not None:
                    write_text(lab.no_ip_file, places.why_no_ip)
                trio.run(_run, lab, places, ready_fd, strict_exception_groups=True)
            finally:
                ignore_signals()
                end_inhabitants(lab.root)
                if namespaces is not None:
                    namespaces.destroy()
    except* KeyboardInterrupt:
        status = 130
    except* ForwardError as failed:
        problem = "; ".join(map(str, leaves(failed)))
        _log.error("%s", problem)
        with suppress(OSError):  # it may have been ready, and the pipe closed, before
            os.write(ready_fd, problem.encode())
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
