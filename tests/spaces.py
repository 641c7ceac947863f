# SPDX-License-Identifier: GPL-2.0-or-later
"""A few network namespaces for one test, joined by veth pairs. For one thread, as root."""

import ctypes
import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self

import pytest
from bounds import BOUND_S
from settled import settle

from qubes_fwd_qrexec.lab import netns

PROBLEM = netns.why_unavailable()
needs_namespaces = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_numbers = itertools.count()


class Spaces:
    """Namespaces with short names, within a ``with``; their real names are this process's own."""

    def __init__(self, *names: str) -> None:
        self._prefix = f"t{os.getpid()}-{next(_numbers)}-"
        self._names = names
        self._fds: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            for name in self._names:
                self.ip("netns", "add", self._prefix + name)
                self._fds[name] = os.open(f"/run/netns/{self._prefix}{name}", os.O_RDONLY | os.O_CLOEXEC)
                self.ip_in(name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)
        for name in self._names:
            with suppress(subprocess.CalledProcessError):
                self.ip("netns", "delete", self._prefix + name)

    def name(self, name: str) -> str:
        """The real name of one, for ``ip netns``."""
        return self._prefix + name

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """What is done in this thread, and the programs that are started, are in that network."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(self._fds[name])
            try:
                yield
            finally:
                _enter(before)
        finally:
            os.close(before)

    def join(self, one: str, other: str, *nets: tuple[str, str]) -> None:
        """A pair of interfaces, each named after the other end; each net is an address for either end."""
        ends = {one: (other, 0), other: (one, 1)}
        self.ip(
            *("link", "add", other, "netns", self._prefix + one, "type", "veth"),
            *("peer", "name", one, "netns", self._prefix + other),
        )
        for name, (device, end) in ends.items():
            self.ip_in(name, "link", "set", device, "up")
            for net in nets:
                extra = ["nodad"] if ":" in net[end] else []
                self.ip_in(name, "address", "add", net[end], "dev", device, *extra)
        settle(partial(self.within, name) for name in ends)

    def ip_in(self, name: str, *arguments: str) -> None:
        self.ip("-n", self._prefix + name, *arguments)

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=BOUND_S)

    def forward_packets(self, name: str) -> None:
        """Make a router of it."""
        with self.within(name):
            for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                Path("/proc/sys/net", path).write_text("1")

    def run(self, name: str, *command: str, text: str = "") -> str:
        with self.within(name):
            done = subprocess.run(
                command, input=text, capture_output=True, text=True, timeout=BOUND_S, check=False
            )
        assert done.returncode == 0, done.stderr
        return done.stdout


def _enter(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
