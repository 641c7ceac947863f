# SPDX-License-Identifier: GPL-2.0-or-later
"""The qubes of a lab as network namespaces, with a LAN beside sys-net and no IP path between qubes.

Needs root and the ``ip`` program. All names begin with a prefix made from the lab's path, so that
several labs live side by side and what a dead one left behind is found and removed.
"""

import ctypes
import hashlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from qubes_fwd_qrexec.common.errors import StoreError

from .directory import LabDirectory
from .qube import QubeClass

LAN = "lan"
EDGE = "sys-net"
# The LAN host's addresses, and sys-net's. The second network is that of a client who is not allowed.
LAN_HOST = "192.168.77.2"
LAN_HOST_REFUSED = "192.168.88.2"
LAN_HOST_IPV6 = "fd77::2"
EDGE_ADDRESS = "192.168.77.1"
EDGE_ADDRESS_REFUSED = "192.168.88.1"
EDGE_ADDRESS_IPV6 = "fd77::1"

_ADDRESSES = {
    LAN: (f"{LAN_HOST}/24", f"{LAN_HOST_REFUSED}/24", f"{LAN_HOST_IPV6}/64"),
    EDGE: (f"{EDGE_ADDRESS}/24", f"{EDGE_ADDRESS_REFUSED}/24", f"{EDGE_ADDRESS_IPV6}/64"),
}
# Where ip-netns(8) keeps them.
_NAMED = Path("/run/netns")
# include/uapi/linux/sched.h.
_CLONE_NEWNET = 0x40000000
_IP_TIMEOUT_S = 20.0


def namespace_name(lab: LabDirectory, qube: str) -> str:
    """The namespace of a qube, or of `LAN`."""
    return _prefix(lab) + qube


def why_unavailable() -> str | None:
    """Why there can be no namespaces here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        _ip("-V")
    except StoreError as error:
        return str(error)
    return None


class Namespaces:
    """`create`, then `entering`, then `destroy`; all of them in one thread."""

    kind = "namespaces"

    def __init__(self, lab: LabDirectory) -> None:
        self._lab = lab
        self._fds: dict[str, int] = {}
        self._home_fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def create(self) -> None:
        """Make all namespaces anew; raises `StoreError`, and then there are none."""
        destroy(self._lab)
        names = [
            qube.name
            for qube in self._lab.qubes().values()
            if qube.klass not in (QubeClass.ADMIN, QubeClass.TEMPLATE)
        ]
        try:
            for name in (LAN, *names):
                self._add(name)
            if EDGE in names:
                self._connect_lan()
        except BaseException:
            self.destroy()
            raise

    def destroy(self) -> None:
        """Remove every namespace of this lab, however far `create` got."""
        for fd in (*self._fds.values(), self._home_fd):
            os.close(fd)
        self._fds.clear()
        destroy(self._lab)

    def namespace_fd(self, qube: str) -> int:
        """As `Places.namespace_fd`; a qube that was added since `create` gets its namespace now."""
        if qube not in self._fds:
            self._add(qube)
        return self._fds[qube]

    def entering(self, qube: str) -> Callable[[], AbstractContextManager[None]]:
        """What puts this thread into a qube's network, for a block without await."""
        fd = self.namespace_fd(qube)

        @contextmanager
        def enter() -> Iterator[None]:
            _set_namespace(fd)
            try:
                yield
            finally:
                _set_namespace(self._home_fd)

        return enter

    def _add(self, name: str) -> None:
        full_name = namespace_name(self._lab, name)
        _ip("netns", "add", full_name)
        _ip("-n", full_name, "link", "set", "lo", "up")
        self._fds[name] = os.open(_NAMED / full_name, os.O_RDONLY | os.O_CLOEXEC)

    def _connect_lan(self) -> None:
        lan, edge = (namespace_name(self._lab, name) for name in (LAN, EDGE))
        _ip("-n", lan, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", edge)
        for name, addresses in _ADDRESSES.items():
            full_name = namespace_name(self._lab, name)
            _ip("-n", full_name, "link", "set", "eth0", "up")
            for address in addresses:
                # Without duplicate address detection the address can be bound at once.
                extra = ["nodad"] if ":" in address else []
                if not extra or _has_ipv6():
                    _ip("-n", full_name, "address", "add", address, "dev", "eth0", *extra)


def enter_for_good(lab: LabDirectory, qube: str) -> None:
    """Move this thread into a qube's namespace; raises `StoreError` if there is none."""
    path = _NAMED / namespace_name(lab, qube)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; is the lab up, and is {qube} a qube of it?") from error
    _set_namespace(fd)
    os.close(fd)


def destroy(lab: LabDirectory) -> None:
    """Remove all namespaces of a lab, and ask what still runs in them to end."""
    try:
        names = [entry.name for entry in _NAMED.iterdir() if entry.name.startswith(_prefix(lab))]
    except FileNotFoundError:
        return
    for name in names:
        # A half-made one has no pids to list, and may not even be a namespace yet.
        with suppress(StoreError):
            for pid in _ip("netns", "pids", name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGTERM)
        _ip("netns", "delete", name)


def _prefix(lab: LabDirectory) -> str:
    digest = hashlib.sha256(os.fsencode(lab.root.resolve())).hexdigest()
    return f"fwd{digest[:8]}-"


def _has_ipv6() -> bool:
    return Path("/proc/net/if_inet6").exists()


def _set_namespace(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        raise StoreError(f"setns: {os.strerror(ctypes.get_errno())}")


def _ip(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["ip", *arguments], capture_output=True, text=True, timeout=_IP_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise StoreError("the program 'ip' is missing; Debian has it in the package iproute2") from None
    except subprocess.TimeoutExpired as error:
        raise StoreError(f"ip {' '.join(arguments)}: no end after {_IP_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        raise StoreError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
