# SPDX-License-Identifier: GPL-2.0-or-later
"""Noticing a peer that is gone without a word: its machine is off, or the network between is.

Whoever waits for bytes from it would wait for ever, so it is asked; whoever has sent something would find
out by the kernel's own retries, after 15 minutes to half an hour.
"""

import socket

# After five minutes without a byte the peer is asked, and then once a minute: often enough that a slot is not
# held for the kernel's own two hours (net.ipv4.tcp_keepalive_time), and 10,000 idle ones cost 35 packets a
# second.
IDLE_S = 300
INTERVAL_S = 60
COUNT = 10
# tcp(7), TCP_USER_TIMEOUT: what was sent may wait for so long to be acknowledged, and so may what the peer
# does not take. With it the count of unanswered questions has no meaning of its own (Linux,
# net/ipv4/tcp_timer.c), so it is when the last of them would be over. It is about what the kernel's own
# retries take (net.ipv4.tcp_retries2: 924 s at least), and fifteen times what web servers allow a client
# that takes nothing.
USER_TIMEOUT_MS = (IDLE_S + INTERVAL_S * COUNT) * 1000


def notice_dead_peers(sock: socket.socket) -> None:
    """For a TCP socket; what a listening one accepts inherits it. Raises OSError."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, COUNT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
