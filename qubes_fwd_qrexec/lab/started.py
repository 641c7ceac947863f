# SPDX-License-Identifier: GPL-2.0-or-later
"""A qrexec service started or connected to, as the agent of its qube does it.

Facts: qubes-core-qrexec libqrexec/exec.c. Two things are left out, as the lab's qubes are no boundary:
users (everything runs as the user who runs the lab) and waiting for a session.
"""

import errno
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from qubes_fwd_qrexec.firewall.ask import DIRECTORY_VARIABLE as FIREWALL_DIRECTORY_VARIABLE
from qubes_fwd_qrexec.target.callnotes import DIRECTORY_VARIABLE
from qubes_fwd_qrexec.target.handover import SOCKET_VARIABLE
from qubes_fwd_qrexec.target.listenersockets import LISTENER_DIRECTORY_VARIABLE
from qubes_fwd_qrexec.target.servers import FILES_VARIABLE
from qubes_fwd_qrexec.target.statusservice import (
    FIREWALL_STATE_VARIABLE,
    STARTS_VARIABLE,
)

from .agents import AgentProcess
from .directory import QubeDirectory
from .inhabitants import VARIABLE as QUBE_VARIABLE
from .rpcconfig import RpcConfig
from .services import Executable, ServiceMissingError, ServiceUnusableError, SocketService, TcpService

# What of the broker's environment a service must not see (exec.c, should_strip_env_var).
_STRIPPED_PREFIX = "QREXEC"


@dataclass(frozen=True, slots=True)
class StartedProcess:
    """An executable service; all its ends are ours and non-blocking. ``stderr_fd`` is a pipe."""

    agent: AgentProcess
    stdin: socket.socket
    stdout: socket.socket
    stderr_fd: int


@dataclass(frozen=True, slots=True)
class ConnectedSocket:
    """A socket service: one socket both ways; ``descriptor`` is to be sent first, and may be empty."""

    agent: AgentProcess
    stream: socket.socket
    descriptor: bytes
    config: RpcConfig


Started = StartedProcess | ConnectedSocket


async def start_process(
    agent: AgentProcess,
    service: Executable,
    full_name: str,
    source: str,
    directory: Path,
    namespace_fd: int | None,
) -> StartedProcess:
    """Have the agent start an executable service with two UNIX sockets as stdin and stdout.

    Raises `ServiceMissingError` if the file or its interpreter is not there, `ServiceUnusableError` if it
    cannot be executed.
    """
    argument = full_name.partition("+")[2]
    with ExitStack() as undo, ExitStack() as its_ends:
        stdin, its_stdin = socket.socketpair()
        stdout, its_stdout = socket.socketpair()
        for sock in (stdin, stdout):
            undo.enter_context(sock)
        for sock in (its_stdin, its_stdout):
            its_ends.enter_context(sock)
        stderr_fd, its_stderr = os.pipe()
        undo.callback(os.close, stderr_fd)
        its_ends.callback(os.close, its_stderr)
        order = {
            "argv": [str(service.path), *([argument] if argument else [])],
            "directory": str(directory),
            "environment": service_environment(full_name, source, directory),
        }
        try:
            fds = [its_stdin.fileno(), its_stdout.fileno(), its_stderr]
            await agent.order(order, fds, namespace_fd)
        except FileNotFoundError as error:
            raise ServiceMissingError(f"{service.path}: {error.strerror}") from error
        except OSError as error:
            raise ServiceUnusableError(f"{service.path}: {error.strerror}") from error
        undo.pop_all()
    stdin.setblocking(False)
    stdout.setblocking(False)
    return StartedProcess(agent, stdin, stdout, stderr_fd)


def agents_environment(base: Mapping[str, str]) -> dict[str, str]:
    """What every service finds in its environment.

    The broker's interpreter comes first in PATH, so that programs installed beside it are found.
    """
    environment = {key: value for key, value in base.items() if not key.startswith(_STRIPPED_PREFIX)}
    search = [str(Path(sys.executable).parent), base.get("PATH", os.defpath)]
    return environment | {"PATH": os.pathsep.join(search)}


def service_environment(full_name: str, source: str, directory: Path) -> dict[str, str]:
    """What one service finds in its environment besides; its agent adds QREXEC_AGENT_PID."""
    return {
        "QREXEC_REMOTE_DOMAIN": source,
        # A qube is never told which target was asked for; only dom0 is.
        "QREXEC_REQUESTED_TARGET_TYPE": "",
        "QREXEC_SERVICE_ARGUMENT": full_name.partition("+")[2],
        "QREXEC_SERVICE_FULL_NAME": full_name,
        **qube_environment(directory),
    }


def qube_environment(directory: Path) -> dict[str, str]:
    """What every program of the target's side finds, in a qube by its directory."""
    return {
        QUBE_VARIABLE: str(directory),
        # Each qube has a /run of its own.
        DIRECTORY_VARIABLE: str(directory / "run" / "forward"),
        SOCKET_VARIABLE: str(QubeDirectory(directory).single_calls_socket),
        FILES_VARIABLE: os.pathsep.join(map(str, QubeDirectory(directory).servers_files)),
        LISTENER_DIRECTORY_VARIABLE: str(QubeDirectory(directory).listener_run),
        FIREWALL_STATE_VARIABLE: str(QubeDirectory(directory).firewall_state),
        FIREWALL_DIRECTORY_VARIABLE: str(QubeDirectory(directory).firewall_run),
        # It never is: whoever starts a listener in a lab waits until it is ready.
        STARTS_VARIABLE: str(directory / "run" / "qubes-service" / "qubes-forward-listener"),
    }


async def connect_service(
    agent: AgentProcess,
    service: SocketService | TcpService,
    full_name: str,
    source: str,
    namespace_fd: int | None,
) -> ConnectedSocket:
    """Have the agent connect to a socket service, so that the service sees the agent's process as its peer.

    Raises `ServiceUnusableError` if nothing accepts.
    """
    config = service.config
    descriptor = b"" if config.skip_service_descriptor else f"{full_name} {source}\0".encode()
    try:
        if isinstance(service, TcpService):
            family = socket.AF_INET6 if ":" in service.host else socket.AF_INET
            (fd,) = await agent.order(
                {"family": family, "address": (service.host, service.port)}, [], namespace_fd
            )
        else:
            order: dict[str, object] = {"family": socket.AF_UNIX, "address": str(service.path)}
            (fd,) = await agent.order(order, [], namespace_fd)
    except OSError as error:
        raise ServiceUnusableError(f"connect: {os.strerror(error.errno or errno.EIO)}") from error
    stream = socket.socket(fileno=fd)
    stream.setblocking(False)
    return ConnectedSocket(agent, stream, descriptor, config)
