# SPDX-License-Identifier: GPL-2.0-or-later
"""Noticing a peer that is gone without a word: its machine is off, or the network between is.

Whoever waits for bytes from it would wait for ever, so it is asked. Whoever has something for it finds out by
the kernel's own retries. A peer that lives and only takes nothing for now stays, however long, as it would
over a direct connection: its kernel answers when it is asked for room (RFC 9293, 3.8.6.1).

So there is no TCP_USER_TIMEOUT: Linux counts with it from the first question for room, answered or not
(net/ipv4/tcp_timer.c, tcp_probe_timer), and would end the one that lives. Without it, what is not answered
is what counts, in each of the three states that a connection can be in:

nothing is to be sent: after IDLE_S a question, then one in each INTERVAL_S, and COUNT of them at most;
something was sent and not acknowledged: net.ipv4.tcp_retries2, which is 15 min at least, and up to 30;
there is no room at the peer: as many questions as tcp_retries2 says, at most 2 min apart, so up to 30 min.
"""

import socket

# After five minutes without a byte the peer is asked, and then once a minute: often enough that a slot is not
# held for the kernel's own two hours (net.ipv4.tcp_keepalive_time), and 10,000 idle ones cost 35 packets a
# second.
IDLE_S = 300
INTERVAL_S = 60
COUNT = 10


def notice_dead_peers(sock: socket.socket) -> None:
    """For a TCP socket; what a listening one accepts inherits it. Raises OSError."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, COUNT)
