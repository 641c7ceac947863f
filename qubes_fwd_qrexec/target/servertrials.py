# SPDX-License-Identifier: GPL-2.0-or-later
"""Trials of a server of this qube, for dom0 alone: whether one is where calls get to, or packets, and whether
it seems to expect a PROXY header.
"""

import selectors
import socket
import time
from contextlib import ExitStack
from ipaddress import ip_address
from typing import NamedTuple

from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.report import Answer, Expects, Trial
from qubes_fwd_qrexec.common.values import IPAddress, Proto, unmapped
from qubes_fwd_qrexec.relay.copy import close_cleanly
from qubes_fwd_qrexec.system.logs import one_line
from qubes_fwd_qrexec.system.sockdiag import SocketsError, served_at

from .localserver import ServiceError, connect
from .servers import Servers, ServersError

# A server on this machine answers at once, and dom0 waits 5 s for everything.
_CONNECT_TIMEOUT_S = 1.0
# How long a server has to end or answer what it does not understand, and then to do so once more.
EXPECT_S = 0.5
AGAIN_S = 0.5
_READ_BYTES = 4096
# A header that carries no address, as a health check sends it (docs/facts.md, R4), and the same bytes with
# one fault. Who expects a header goes on with the first and ends the connection after the second. Nobody
# else sees a difference.
_HEADERS = {
    Expects.V2: (b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0", b"\r\n\r\n\0\r\nQUIT\n\x90\0\0\0"),
    Expects.V1: (b"PROXY UNKNOWN\r\n", b"PRXOY UNKNOWN\r\n"),
}


class _Place(NamedTuple):
    """Where calls to a port get to, and what this qube's owner says of it, or "". None: on a UNIX socket."""

    addresses: frozenset[IPAddress] | None
    said: str


def _place(proto: Proto, port: int) -> _Place:
    servers = Servers()
    try:
        line = servers.find(proto, port)
        addresses = servers.addresses(proto, port)
    except ServersError as error:
        return _Place(frozenset(), f"calls get to no server: {error}")
    said = "" if line is None else f"calls get to {line.where}, as {line.place} says"
    if any(address.family == socket.AF_UNIX for address in addresses):
        return _Place(None, said)
    return _Place(frozenset(ip_address(address.host) for address in addresses), said)


def try_port(port: int) -> Trial:
    """Whether a server takes a connection where calls get to; the connection is ended at once."""
    place = _place(Proto.TCP, port)
    try:
        server = connect(port, _CONNECT_TIMEOUT_S)
    except ServiceError as error:
        is_silent = error.status == ExitStatus.SERVER_TIMEOUT
        answer = Answer.SILENT if is_silent else Answer.REFUSED
        if place.said:
            # Where a line is wrong, that is the error.
            text = f"{error}; {place.said}" if place.addresses != frozenset() else str(error)
            return Trial(answer, Refusal.ELSEWHERE, one_line(text))
        if not is_silent and (listens_at := _listening(Proto.TCP, port)):
            return Trial(answer, Refusal.NOT_AT_LOOPBACK, one_line(f"{error}; {listens_at}"))
        return Trial(answer, Refusal.SERVER, one_line(str(error)))
    close_cleanly(server)
    text = f"a server accepts connections on port {port}"
    if place.said:
        return Trial(Answer.THROUGH, Refusal.ELSEWHERE, one_line(f"{text}; {place.said}"))
    return Trial(Answer.THROUGH, "", text)


def _listening(proto: Proto, port: int) -> str:
    """At which addresses a server listens, in words; nothing if none does, or the kernel does not say."""
    try:
        return _worded(_served_at(proto, port))
    except SocketsError:
        return ""


def _served_at(proto: Proto, port: int) -> list[IPAddress]:
    protocol = socket.IPPROTO_TCP if proto is Proto.TCP else socket.IPPROTO_UDP
    return sorted(served_at(protocol, port), key=str)


def _worded(addresses: list[IPAddress]) -> str:
    return f"a server listens at {', '.join(map(str, addresses))}" if addresses else ""


def look_at(proto: Proto, port: int) -> Trial:
    """Whether a server listens where packets of others get, or calls. It is not called: it may serve one
    client alone, or say something to each.
    """
    what, place = f"{proto} port {port}", _place(proto, port)
    said = f"; {place.said}" if place.said else ""
    if place.addresses is None:
        return Trial(Answer.REFUSED, Refusal.LOOPBACK, one_line(f"{what}{said}"))
    try:
        addresses = _served_at(proto, port)
    except SocketsError as error:
        return Trial(Answer.FAILED, "", one_line(f"{what}: {error}"))
    if not addresses:
        return Trial(Answer.REFUSED, Refusal.SERVER, one_line(f"{what}: nothing listens there{said}"))
    at = [unmapped(address) for address in addresses]
    reason = ""
    if not place.addresses or not any(found in place.addresses or found.is_unspecified for found in at):
        reason = Refusal.ELSEWHERE if said else Refusal.NOT_AT_LOOPBACK
    text = one_line(f"{what}: {_worded(addresses)}{said}")
    if all(address.is_loopback for address in at):
        return Trial(Answer.REFUSED, reason or Refusal.LOOPBACK, text)
    return Trial(Answer.THROUGH, reason, text)


def try_header(port: int, timeout_s: float = EXPECT_S, again_s: float = AGAIN_S) -> Trial:
    """What a server of TCP seems to expect in front of a connection, as the reason; "" if it does not show.

    It sees two connections with a few bytes each, or four. Both times are in seconds.
    """
    for expected, (right, wrong) in _HEADERS.items():
        try:
            good, bad = _outcomes(port, (right, wrong), timeout_s, again_s)
        except (ServiceError, OSError) as error:
            return Trial(Answer.FAILED, "", one_line(str(error)))
        if bad.has_ended and not good.has_ended:
            return Trial(Answer.THROUGH, expected, "the server ends what has no PROXY header in front of it")
        if not bad.has_ended:
            break  # it does not look at headers, or does not show it
    if bad.has_answered or bad.has_ended:
        return Trial(Answer.THROUGH, Expects.NONE, "the server treats a PROXY header as anything else")
    return Trial(Answer.SILENT, "", "the server does not show whether it expects a PROXY header")


class _Outcome:
    """What has come back on one connection; of the bad one, the first of the two."""

    has_answered = False
    has_ended = False


def _outcomes(
    port: int, sent: tuple[bytes, bytes], timeout_s: float, again_s: float
) -> tuple[_Outcome, _Outcome]:
    """What comes back for two beginnings of a connection. Raises `ServiceError` and OSError."""
    outcomes = _Outcome(), _Outcome()
    with ExitStack() as opened:
        selector = opened.enter_context(selectors.DefaultSelector())
        for data, outcome in zip(sent, outcomes, strict=True):
            sock = opened.enter_context(connect(port, _CONNECT_TIMEOUT_S))
            sock.send(data)
            selector.register(sock, selectors.EVENT_READ, (sock, outcome))
        good, bad = outcomes
        deadline = time.monotonic() + timeout_s
        while not bad.has_answered and not (good.has_ended and bad.has_ended):
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for key, _ in ready:
                sock, outcome = key.data
                if _has_received(sock):
                    outcome.has_answered = True
                else:
                    outcome.has_ended = True
                    selector.unregister(sock)
                    if outcome is bad:
                        deadline = time.monotonic() + again_s
    return outcomes


def _has_received(sock: socket.socket) -> bool:
    """Whether there was something to read, and not the end."""
    try:
        return bool(sock.recv(_READ_BYTES))
    except OSError:
        return False
