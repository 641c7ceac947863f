# SPDX-License-Identifier: GPL-2.0-or-later
"""What a TCP socket has sent that has not come yet."""

import fcntl
import socket
import struct
import termios

_SIOCOUTQNSD = 0x894B  # linux/sockios.h


def acknowledge(sock: socket.socket) -> None:
    """Have the kernel acknowledge at once what a TCP socket has received; it likes to wait for a while."""
    if sock.family != socket.AF_UNIX and sock.fileno() >= 0:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def in_flight_bytes(sock: socket.socket) -> int:
    """What a TCP socket has sent and its peer has not acknowledged."""
    if sock.family == socket.AF_UNIX or sock.fileno() < 0:
        return 0
    all_of_it, unsent = (
        struct.unpack("i", fcntl.ioctl(sock.fileno(), request, bytes(4)))[0]
        for request in (termios.TIOCOUTQ, _SIOCOUTQNSD)
    )
    return int(all_of_it - unsent)
