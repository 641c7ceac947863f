# SPDX-License-Identifier: GPL-2.0-or-later
"""Connecting to a server of this qube in a plain loop, at one address after the other until one answers.

A server on loopback has answered before the kernel returns to us. So that is looked at first, and only
who does not answer at once costs a timer and a place in the loop.
"""

import errno
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from qubes_fwd_qrexec.relay.copy import abort
from qubes_fwd_qrexec.relay.loop import WRITE, Loop, Timer

from .localserver import CONNECT_TIMEOUT_S, RETRY_S, check_answered, has_answered, is_begun, new_socket
from .servers import ServerAddress


class Connecting(ABC):
    """One connection to ``port``, from `start` until it is there, has failed or is given up.

    One of `_connected` and `_not_connected` is called, perhaps within `start`.
    """

    def __init__(self, loop: Loop, port: int) -> None:
        self._loop = loop
        self._port = port
        self._addresses: Iterator[ServerAddress] = iter(())
        self._sock: socket.socket | None = None
        self._trouble: OSError | None = None
        self._deadline: Timer | None = None
        self._retry: Timer | None = None

    @abstractmethod
    def _connected(self, sock: socket.socket) -> None:
        """There is a connection, which is the callee's from now on."""

    @abstractmethod
    def _not_connected(self, trouble: OSError) -> None:
        """There is none; the trouble is that of the first address, or a ConnectionResetError of any."""

    @abstractmethod
    def fail(self) -> None:
        """A bug ends it."""

    def start(self, addresses: Iterable[ServerAddress]) -> None:
        """Try these addresses, for `CONNECT_TIMEOUT_S` in all."""
        self._addresses = iter(addresses)
        self._try_next()

    def give_up(self) -> None:
        """Let go of everything; nothing is called any more."""
        self._stop_waiting()
        if self._sock is not None:
            self._loop.unwatch(self._sock.fileno())
            abort(self._sock)
            self._sock = None

    def _try_next(self) -> None:
        for address in self._addresses:
            try:
                sock = new_socket(address.family)
            except OSError as error:
                self._trouble = self._trouble or error
                continue
            try:
                if not is_begun(sock, address, self._port):
                    sock.close()
                    self._addresses = iter((address,))
                    self._wait()
                    self._retry = self._loop.after(RETRY_S, self._try_next, self.fail)
                    return
                if not has_answered(sock):
                    self._loop.watch_for(self, sock.fileno(), WRITE)
                    self._sock = sock
                    self._wait()
                    return
            except OSError as error:
                sock.close()
                self._trouble = self._trouble or error
            else:
                if self._is_settled_by(sock):
                    return
        self._stop_waiting()
        self._not_connected(self._trouble or OSError(errno.ENOENT, os.strerror(errno.ENOENT)))

    def on_ready(self, _events: int) -> None:
        """It is known what becomes of the connection."""
        if self._sock is not None:
            sock, self._sock = self._sock, None
            self._loop.unwatch(sock.fileno())
            if not self._is_settled_by(sock):
                self._try_next()

    def _is_settled_by(self, sock: socket.socket) -> bool:
        """The server has answered; False if another address should be tried."""
        try:
            check_answered(sock, self._port)
        except OSError as error:
            abort(sock)
            if not isinstance(error, ConnectionResetError):
                self._trouble = self._trouble or error
                return False
            self._stop_waiting()
            self._not_connected(error)  # it was there, so no other is tried
        else:
            self._stop_waiting()
            self._connected(sock)
        return True

    def _wait(self) -> None:
        if self._deadline is None:
            self._deadline = self._loop.after(CONNECT_TIMEOUT_S, self._too_late, self.fail)

    def _stop_waiting(self) -> None:
        for timer in (self._deadline, self._retry):
            if timer is not None:
                timer.cancel()

    def _too_late(self) -> None:
        self.give_up()
        self._not_connected(TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
