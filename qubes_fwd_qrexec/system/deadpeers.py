# SPDX-License-Identifier: GPL-2.0-or-later
"""Detecting a peer that disappeared without a word: its machine, or the network in between, is off.

Waiting for bytes from such a peer would take for ever, so keepalive probes it. With something to send, the
kernel's own retries find out. A peer that is alive and only takes nothing stays for as long as it likes, as
on a direct connection: its kernel answers window probes (RFC 9293, 3.8.6.1).

So there is no TCP_USER_TIMEOUT: Linux counts that from the first window probe, answered or not
(net/ipv4/tcp_timer.c, tcp_probe_timer), and would end a live connection. Without it, only unanswered packets
count, in each of the three states of a connection:

nothing to send: a probe after IDLE_S, then one every INTERVAL_S, at most COUNT of them;
something sent and not acknowledged: net.ipv4.tcp_retries2, which takes 15 to 30 min;
no room at the peer: as many window probes as tcp_retries2 says, at most 2 min apart, so up to 30 min.
"""

import socket

# Probe after five minutes without a byte, and then once a minute. So a dead peer does not hold a slot for the
# kernel's default of two hours (net.ipv4.tcp_keepalive_time), and 10,000 idle connections cost 35 packets a
# second.
IDLE_S = 300
INTERVAL_S = 60
COUNT = 10


def notice_dead_peers(sock: socket.socket) -> None:
    """Set the options of a TCP socket; accepted sockets inherit them from a listening one. Raises OSError."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, COUNT)
