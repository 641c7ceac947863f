# SPDX-License-Identifier: GPL-2.0-or-later
"""A qrexec service started or connected to, as the agent of its qube does it.

Facts: qubes-core-qrexec libqrexec/exec.c. Two things are left out, as the lab's qubes are no boundary:
users (all runs as who runs the lab) and waiting for a session.
"""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import trio

from qubes_fwd_qrexec.revocation import DIRECTORY_VARIABLE
from qubes_fwd_qrexec.statusservice import FIREWALL_STATE_VARIABLE, LISTENER_DIRECTORY_VARIABLE
from qubes_fwd_qrexec.unixsockets import socket_address

from .directory import QubeDirectory
from .rpcconfig import RpcConfig
from .services import Executable, ServiceMissingError, ServiceUnusableError, SocketService, TcpService

# Enters a qube's network namespace, for the calling thread and as long as the block lasts.
EnterQube = Callable[[], AbstractContextManager[None]]

# What of the broker's environment a service must not see (exec.c, should_strip_env_var).
_STRIPPED_PREFIX = "QREXEC"


@dataclass(frozen=True, slots=True)
class StartedProcess:
    """An executable service; all its ends are ours and non-blocking. ``stderr_fd`` is a pipe."""

    process: subprocess.Popen[bytes]
    stdin: socket.socket
    stdout: socket.socket
    stderr_fd: int


@dataclass(frozen=True, slots=True)
class ConnectedSocket:
    """A socket service: one socket both ways; ``descriptor`` is to be sent first, and may be empty."""

    stream: socket.socket
    descriptor: bytes
    config: RpcConfig


Started = StartedProcess | ConnectedSocket


def start_process(
    service: Executable, full_name: str, source: str, directory: Path, enter: EnterQube
) -> StartedProcess:
    """Start an executable service with two UNIX sockets as stdin and stdout.

    Raises `ServiceMissingError` if the file or its interpreter is not there, `ServiceUnusableError` if it
    cannot be executed.
    """
    argument = full_name.partition("+")[2]
    with ExitStack() as undo:
        stdin, its_stdin = map(undo.enter_context, socket.socketpair())
        stdout, its_stdout = map(undo.enter_context, socket.socketpair())
        stderr_fd, its_stderr = os.pipe()
        undo.callback(os.close, stderr_fd)
        undo_stderr = undo.enter_context(ExitStack())
        undo_stderr.callback(os.close, its_stderr)
        try:
            with enter():
                process = subprocess.Popen(
                    [str(service.path), *([argument] if argument else [])],
                    stdin=its_stdin.fileno(),
                    stdout=its_stdout.fileno(),
                    stderr=its_stderr,
                    cwd=directory,
                    env=service_environment(os.environ, full_name, source, directory),
                    # A group of its own, so that the lab's end reaches what the service started.
                    start_new_session=True,
                )
        except FileNotFoundError as error:
            raise ServiceMissingError(f"{service.path}: {error.strerror}") from error
        except OSError as error:
            raise ServiceUnusableError(f"{service.path}: {error.strerror}") from error
        undo_stderr.close()
        its_stdin.close()
        its_stdout.close()
        undo.pop_all()
    stdin.setblocking(False)
    stdout.setblocking(False)
    return StartedProcess(process, stdin, stdout, stderr_fd)


def service_environment(
    base: Mapping[str, str], full_name: str, source: str, directory: Path
) -> dict[str, str]:
    """What a service finds in its environment.

    The broker's interpreter comes first in PATH, so that programs installed beside it are found.
    """
    environment = {key: value for key, value in base.items() if not key.startswith(_STRIPPED_PREFIX)}
    search = [str(Path(sys.executable).parent), base.get("PATH", os.defpath)]
    return environment | {
        "PATH": os.pathsep.join(search),
        "QREXEC_AGENT_PID": str(os.getpid()),
        "QREXEC_REMOTE_DOMAIN": source,
        # A qube is never told which target was asked for; only dom0 is.
        "QREXEC_REQUESTED_TARGET_TYPE": "",
        "QREXEC_SERVICE_ARGUMENT": full_name.partition("+")[2],
        "QREXEC_SERVICE_FULL_NAME": full_name,
        # Each qube has a /run of its own.
        DIRECTORY_VARIABLE: str(directory / "run" / "forward"),
        LISTENER_DIRECTORY_VARIABLE: str(QubeDirectory(directory).listener_run),
        FIREWALL_STATE_VARIABLE: str(QubeDirectory(directory).firewall_state),
    }


async def connect_service(
    service: SocketService | TcpService, full_name: str, source: str, enter: EnterQube
) -> ConnectedSocket:
    """Connect to a socket service; raises `ServiceUnusableError` if nothing accepts."""
    config = service.config
    descriptor = b"" if config.skip_service_descriptor else f"{full_name} {source}\0".encode()
    family = socket.AF_UNIX
    if isinstance(service, TcpService):
        family = socket.AF_INET6 if ":" in service.host else socket.AF_INET
    with enter():
        # A socket stays in the namespace that it was made in.
        stream = trio.socket.from_stdlib_socket(socket.socket(family, socket.SOCK_STREAM))
    try:
        if isinstance(service, TcpService):
            await stream.connect((service.host, service.port))
        else:
            await _connect_path(stream, service.path)
    except OSError as error:
        stream.close()
        raise ServiceUnusableError(f"connect: {os.strerror(error.errno or errno.EIO)}") from error
    except BaseException:
        stream.close()
        raise
    plain = socket.socket(fileno=stream.detach())
    plain.setblocking(False)
    return ConnectedSocket(plain, descriptor, config)


async def _connect_path(stream: trio.socket.SocketType, path: Path) -> None:
    with socket_address(path) as address:
        await stream.connect(address)
