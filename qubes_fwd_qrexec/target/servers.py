# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the servers of this qube are: at 127.0.0.1 or ::1, unless this qube's owner names another place.

    # PROTO PORTS WHERE
    tcp 8080 eth0
    tcp 8000-8099 10.137.0.12
    tcp 3000 unix:/run/app/web.sock
    udp 53 eth0
    tcp 22 localhost

Two files may have such lines: the template's, and the qube's own, which counts for each port that it names. A
call only names a port, and nothing of it gets into this. A port that a line names goes there and nowhere
else. Where a line is wrong, or somebody other than root could have written it, the ports that it names are
refused: a connection must not get to a server that its owner did not mean. If nobody can tell which ports it
names, it may be any.

Texts of errors reach the caller, which is another qube, so they quote nothing of a file.
"""

import os
import re
import socket
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import ForwardError, TextError
from qubes_fwd_qrexec.common.services import SERVERS_FILE
from qubes_fwd_qrexec.common.values import PORT_MAX, IPAddress, Proto, TargetPorts, parse_address
from qubes_fwd_qrexec.system.interfaces import interface_addresses

# The qube's own file first; /usr/local of an app qube is its own, and /etc its template's.
FILES = (SERVERS_FILE, "/etc/qubes-forward/servers.conf")
# A lab names others, separated by colons, and need not be root's.
FILES_VARIABLE = "QUBES_FORWARD_SERVERS"
# More than a line for each of a thousand servers.
_FILE_MAX_BYTES = 65_536
_WRITABLE_TO_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_PROTOS = {"tcp": (Proto.TCP,), "udp": (Proto.UDP,)}
_ALL_PORTS = TargetPorts(1, PORT_MAX)
_UNIX = "unix:"
_LOCALHOST = "localhost"
# What Linux takes as a name (dev_valid_name), if it begins with a letter.
_INTERFACE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,14}\Z", re.ASCII)


class ServersError(ForwardError):
    """A port is refused; the text names the file, the line and what is wrong there."""


class ServerAddress(NamedTuple):
    """Where a server may be: ``host`` is an IP address, or with AF_UNIX the path of a socket."""

    family: socket.AddressFamily
    host: str


# In the order in which they are tried.
LOCALHOSTS = (ServerAddress(socket.AF_INET, "127.0.0.1"), ServerAddress(socket.AF_INET6, "::1"))


@dataclass(frozen=True, slots=True)
class Line:
    """One line: ``place`` is where it stands (``FILE:3``), ``problem`` what is wrong with it, or empty."""

    place: str
    protos: tuple[Proto, ...]
    ports: TargetPorts
    where: str
    problem: str = ""

    @classmethod
    def parse(cls, text: str, place: str) -> "Line":
        """Parse a line; one that is wrong has a problem, and the protocols and ports that it may be about."""
        words = text.split()
        proto, ports, where = [*words, "", "", ""][:3]
        line = cls(place, _PROTOS.get(proto, Proto.BOTH.each), _ALL_PORTS, where)
        problem = "" if len(words) == 3 else "it is not of the form PROTO PORTS WHERE"
        if proto not in _PROTOS:
            problem = problem or "the protocol is neither tcp nor udp"
        try:
            line = replace(line, ports=TargetPorts.parse(ports))
        except TextError:
            problem = problem or f"the ports are neither PORT nor PORT-PORT, of 1 to {PORT_MAX}"
        return replace(line, problem=problem or line._problem())

    def _problem(self) -> str:
        """What is wrong with the last word."""
        where = self.where
        if where.startswith(_UNIX):
            if self.protos != _PROTOS["tcp"] or len(self.ports) != 1:
                return "a UNIX socket is for one port of tcp"
            is_path = where.startswith(f"{_UNIX}/") and where.isprintable()
            return "" if is_path else "the path of a UNIX socket begins with / and is printable"
        if where == _LOCALHOST or _INTERFACE.match(where):
            return ""
        try:
            address = parse_address(where)
        except TextError:
            return "the place is none of eth0, an address of this qube, unix:/PATH and localhost"
        if address.is_unspecified or address.is_multicast or (address.version == 6 and address.is_link_local):
            return "the address is none at which one server can be named"
        return ""

    def addresses(self) -> tuple[ServerAddress, ...]:
        """Where the server is now. Raises `ServersError`."""
        if self.problem:
            raise ServersError(f"{self.place}: {self.problem}")
        if self.where == _LOCALHOST:
            return LOCALHOSTS
        if self.where.startswith(_UNIX):
            return (ServerAddress(socket.AF_UNIX, self.where.removeprefix(_UNIX)),)
        if _INTERFACE.match(self.where):
            found = tuple(map(_at, interface_addresses(self.where)))
            if not found:
                raise ServersError(f"{self.place}: this qube has no such interface, or that has no address")
            return found
        address = _at(parse_address(self.where))
        if not _is_own(address):
            raise ServersError(f"{self.place}: this qube does not have that address")
        return (address,)


class Servers:
    """What the files say, read again whenever one has changed.

    ``tell`` hears why a port is refused, once for each reason until then.
    """

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        named = os.environ.get(FILES_VARIABLE)
        self._owners = {0} if named is None else {0, os.geteuid()}
        self._files = FILES if named is None else tuple(named.split(":"))
        self._tell = tell
        self._told: set[str] = set()
        self._seen: list[tuple[int, ...]] = []
        self._lines: list[list[Line]] = []

    def addresses(self, proto: Proto, port: int) -> tuple[ServerAddress, ...]:
        """Where a server may be, in the order in which to try. Raises `ServersError`."""
        try:
            line = self.find(proto, port)
            return LOCALHOSTS if line is None else line.addresses()
        except ServersError as error:
            text = str(error)
            if self._tell is not None and text not in self._told:
                self._told.add(text)
                self._tell(text)
            raise

    def find(self, proto: Proto, port: int) -> Line | None:
        """The line that names a port, if any does. Raises `ServersError` if two of one file do."""
        self._read_if_changed()
        for lines in self._lines:
            found = [line for line in lines if proto in line.protos and port in line.ports]
            wrong = [line for line in found if line.problem]
            if len(found) > 1 and not wrong:
                raise ServersError(f"{found[1].place}: a line before it names the same port")
            if found:
                return (wrong or found)[0]
        return None

    def _read_if_changed(self) -> None:
        seen = [_stamp(path) for path in self._files]
        if seen != self._seen:
            self._lines = [list(_read(path, self._owners)) for path in self._files]
            self._seen = seen
            self._told.clear()


def _stamp(path: str) -> tuple[int, ...]:
    """Another value whenever the file is another, or was changed."""
    try:
        found = os.stat(path)
    except OSError as error:
        return (error.errno or 0,)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read(path: str, owners: set[int]) -> Iterable[Line]:
    """The lines of a file that say something. One about all ports, if the file cannot be read."""
    try:
        # Opening a FIFO must not block.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            text = file.read(_FILE_MAX_BYTES + 1).decode("ascii")
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield _about_all(path, error.strerror or "it cannot be read")
        return
    except UnicodeDecodeError:
        yield _about_all(path, "it is not ASCII")
        return
    if not stat.S_ISREG(status.st_mode) or len(text) > _FILE_MAX_BYTES:
        yield _about_all(path, f"it is no file of at most {_FILE_MAX_BYTES} bytes")
        return
    is_safe = status.st_uid in owners and not status.st_mode & _WRITABLE_TO_OTHERS
    for number, written in enumerate(text.splitlines(), 1):
        if said := written.partition("#")[0].strip():
            line = Line.parse(said, f"{path}:{number}")
            yield line if is_safe else replace(line, problem="others than root may write to this file")


def _about_all(path: str, problem: str) -> Line:
    return Line(path, Proto.BOTH.each, _ALL_PORTS, "", problem)


def _at(address: IPAddress) -> ServerAddress:
    return ServerAddress(socket.AF_INET if address.version == 4 else socket.AF_INET6, str(address))


def _is_own(address: ServerAddress) -> bool:
    """Whether this qube has the address, so that what is sent there stays in this qube."""
    try:
        with socket.socket(address.family, socket.SOCK_DGRAM) as probe:
            probe.bind((address.host, 0))
    except OSError:
        return False
    return True
