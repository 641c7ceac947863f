# SPDX-License-Identifier: GPL-2.0-or-later
"""Which program has a port in use, as far as /proc shows it: /proc/net/tcp, udp and /proc/PID/fd, proc(5).

A program without privileges sees only the descriptors of its own user's processes; otherwise only the user of
the socket is known.
"""

import contextlib
import os
import pwd
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import NamedTuple

from qubes_fwd_qrexec.common.values import IPAddress, Proto, unmapped

PROC = Path("/proc")
# include/net/tcp_states.h: TCP_LISTEN; and TCP_CLOSE, which a UDP socket has that is not connected.
_STATES = {Proto.TCP: "0A", Proto.UDP: "07"}


class _Listening(NamedTuple):
    address: IPAddress
    port: int
    uid: int
    inode: str


def port_holder(address: IPAddress, port: int, proc: Path = PROC, proto: Proto = Proto.TCP) -> str | None:
    """``nginx (process 123)``, or ``a program of user www-data``; None if nothing is known."""
    for found in _listening(proc, proto):
        if found.port == port and _share(found.address, address):
            return _program(found.inode, proc) or f"a program of user {_user(found.uid)}"
    return None


def _share(theirs: IPAddress, ours: IPAddress) -> bool:
    """Whether the two cannot both be bound. ``::`` may include IPv4, which /proc does not show."""
    if int(theirs) == 0 and theirs.version == 6:
        return True
    plain = unmapped(theirs)
    return plain.version == ours.version and (plain == ours or int(plain) == 0 or int(ours) == 0)


def _listening(proc: Path, proto: Proto) -> Iterator[_Listening]:
    for name in (str(proto), f"{proto}6"):
        lines: list[str] = []
        with contextlib.suppress(OSError):  # a kernel without IPv6
            lines = (proc / "net" / name).read_text("ascii").splitlines()[1:]
        for line in lines:
            fields = line.split()
            if fields[3] == _STATES[proto]:
                address, _, port = fields[1].partition(":")
                yield _Listening(_address(address), int(port, 16), int(fields[7]), fields[9])


def _address(text: str) -> IPAddress:
    """Parse words of 32 bits, each in the machine's byte order."""
    words = (int(text[at : at + 8], 16) for at in range(0, len(text), 8))
    packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def _program(inode: str, proc: Path) -> str | None:
    """The process with the lowest PID that has the socket open. Processes may end during the look."""
    for process in sorted((entry for entry in proc.iterdir() if entry.name.isdecimal()), key=_number):
        with contextlib.suppress(OSError):
            if any(_is_socket(fd, inode) for fd in (process / "fd").iterdir()):
                if _number(process) == os.getpid():
                    return "this program itself, for another forward"
                return f"{(process / 'comm').read_text(errors='replace').strip()} (process {process.name})"
    return None


def _number(process: Path) -> int:
    return int(process.name)


def _is_socket(fd: Path, inode: str) -> bool:
    with contextlib.suppress(OSError):
        return str(fd.readlink()) == f"socket:[{inode}]"
    return False


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
