# SPDX-License-Identifier: GPL-2.0-or-later
"""Finding a qrexec service in a qube, as its agent does: from a search path to what is to be done.

Facts: qubes-core-qrexec libqrexec/exec.c (`find_file`, `find_qrexec_service`, `qubes_tcp_connect`). A
pure look at a directory: nothing is started, connected or changed.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from qubes_fwd_qrexec.common.errors import ForwardError, TextError
from qubes_fwd_qrexec.common.values import parse_port

from .rpcconfig import RpcConfig

_TCP = "/dev/tcp"
_NAME_MAX = 255


@dataclass(frozen=True, slots=True)
class Executable:
    """Start ``path``, with the call's argument, if it has one, as argv[1]."""

    path: Path


@dataclass(frozen=True, slots=True)
class SocketService:
    """Connect to the UNIX socket ``path``. The descriptor goes first unless ``config`` skips it."""

    path: Path
    config: RpcConfig


@dataclass(frozen=True, slots=True)
class TcpService:
    """Connect to a numeric ``host`` and ``port``; the descriptor as for `SocketService`."""

    host: str
    port: int
    config: RpcConfig


Service = Executable | SocketService | TcpService


class ServiceMissingError(ForwardError):
    """No such file in the whole search path: the call ends with status 127."""


class ServiceUnusableError(ForwardError):
    """There is one, and it cannot be used: the call ends with status 125."""


def find_service(service_dirs: Sequence[Path], config_dirs: Sequence[Path], full_name: str) -> Service:
    """What the agent would do for ``full_name`` (``SERVICE+ARGUMENT``, the ``+`` always there).

    Raises `ServiceMissingError` or `ServiceUnusableError`.
    """
    name, _, argument = full_name.partition("+")
    config = _find_config(config_dirs, full_name, name)
    path = _find(service_dirs, full_name, name)
    if path is None:
        raise ServiceMissingError(f"service not found: {full_name}")
    try:
        if path.is_symlink() and _is_tcp(target := os.readlink(path)):
            return _tcp_service(target, argument, config)
        mode = path.stat().st_mode
    except OSError as error:
        raise ServiceUnusableError(f"{path}: {error.strerror}") from error
    if stat.S_ISSOCK(mode):
        return SocketService(path, config)
    if os.access(path, os.X_OK):
        return Executable(path)
    raise ServiceUnusableError(f"{path}: neither executable nor a socket")


def _find_config(config_dirs: Sequence[Path], full_name: str, name: str) -> RpcConfig:
    path = _find(config_dirs, full_name, name)
    if path is None:
        return RpcConfig()
    try:
        return RpcConfig.parse(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError as error:
        raise ServiceUnusableError(f"{path}: {error.strerror}") from error
    except TextError as error:
        raise ServiceUnusableError(f"{path}: {error}") from error


def _find(directories: Sequence[Path], full_name: str, name: str) -> Path | None:
    """The first file: ``SERVICE+ARGUMENT`` in every directory, and only then ``SERVICE``.

    A dangling link hides nothing, and any other failure ends the search rather than look further.
    """
    for wanted in (full_name, name):
        if len(wanted) > _NAME_MAX:
            continue
        for directory in directories:
            path = directory / wanted
            try:
                if path.is_symlink() and _is_tcp(os.readlink(path)):
                    return path
                os.stat(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ServiceUnusableError(f"{path}: {error.strerror}") from error
            return path
    return None


def _is_tcp(target: str) -> bool:
    return target == _TCP or target.startswith(_TCP + "/")


def _tcp_service(target: str, argument: str, config: RpcConfig) -> TcpService:
    """``/dev/tcp[/HOST[/PORT]]``: what the link leaves open comes from the argument, ``HOST+PORT``."""
    rest = target.removeprefix(_TCP)
    if rest == "/":
        raise ServiceUnusableError(f"{target}: a host must follow")
    host, _, port = rest.removeprefix("/").partition("/")
    if port:
        if argument:
            raise ServiceUnusableError(
                f"{target}: names host and port; the argument {argument!a} is too much"
            )
    elif not argument:
        raise ServiceUnusableError(f"{target}: the port must come as the argument")
    elif host:
        port = argument
    else:
        host, plus, port = argument.rpartition("+")
        if not plus or "_" in host:
            raise ServiceUnusableError(f"{target}: the argument {argument!a} is not HOST+PORT")
        # The argument's alphabet has no colon, so IPv6 is written with plus signs.
        host = host.replace("+", ":")
    try:
        return TcpService(str(ip_address(host)), parse_port(port), config)
    except (TextError, ValueError) as error:
        raise ServiceUnusableError(f"{target}: {error}") from error
