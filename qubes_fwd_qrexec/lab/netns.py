# SPDX-License-Identifier: GPL-2.0-or-later
"""The qubes of a lab as network namespaces, with a LAN beside sys-net. `wires` has what joins them.

Needs root and the ``ip`` program. All names begin with a prefix made from the lab's path, so that
several labs live side by side and what a dead one left behind is found and removed.
"""

import ctypes
import fcntl
import hashlib
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from threading import Lock

from qubes_fwd_qrexec.common.errors import StoreError

from .directory import LabDirectory
from .qube import Qube, QubeClass

LAN = "lan"
EDGE = "sys-net"
# Where the tunnels of VPN qubes end, and a host on the Internet behind it. It is there if there are tunnels.
PROVIDER = "provider"
# What has a network and is no qube.
OUTSIDE = (LAN, PROVIDER)
# The LAN host's addresses, and sys-net's. The second network is that of a client who is not allowed.
LAN_HOST = "192.168.77.2"
LAN_HOST_REFUSED = "192.168.88.2"
LAN_HOST_IPV6 = "fd77::2"
LAN_HOST_REFUSED_IPV6 = "fd88::2"
PROVIDER_HOST = "203.0.113.7"
PROVIDER_HOST_IPV6 = "fd03::7"
EDGE_ADDRESS = "192.168.77.1"
EDGE_ADDRESS_REFUSED = "192.168.88.1"
EDGE_ADDRESS_IPV6 = "fd77::1"
EDGE_ADDRESS_REFUSED_IPV6 = "fd88::1"

LAN_ADDRESSES = (LAN_HOST, LAN_HOST_REFUSED, LAN_HOST_IPV6, LAN_HOST_REFUSED_IPV6)
EDGE_ADDRESSES = (EDGE_ADDRESS, EDGE_ADDRESS_REFUSED, EDGE_ADDRESS_IPV6, EDGE_ADDRESS_REFUSED_IPV6)
MACS = {LAN: "02:00:00:00:00:02", EDGE: "02:00:00:00:00:01"}
# Where ip-netns(8) keeps them.
_NAMED = Path("/run/netns")
# include/uapi/linux/sched.h.
_CLONE_NEWNET = 0x40000000
# linux/sockios.h and linux/if.h.
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
# Far more than a busy machine takes.
_TIMEOUT_S = 120.0
_MESSAGE_MAX = 400
_PACKAGES = {"ip": "iproute2", "nft": "nftables"}


def namespace_name(lab: LabDirectory, qube: str) -> str:
    """The namespace of a qube, or of `LAN`."""
    return _prefix(lab) + qube


def why_no_firewall() -> str | None:
    """Why there can be no firewall in them, or None."""
    try:
        _run("nft", "-v")
    except StoreError as error:
        return str(error)
    return None


def why_unavailable() -> str | None:
    """Why there can be no namespaces here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        _run("ip", "-V")
    except StoreError as error:
        return str(error)
    return None


class Namespaces:
    """`create`, then the others in any thread, then `destroy`. Nothing joins them yet."""

    kind = "namespaces"

    def __init__(self, lab: LabDirectory, why_no_ip: str | None = None) -> None:
        self.why_no_ip = why_no_ip
        self._lab = lab
        self._adding = Lock()
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
            self._add(LAN, *names)
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
        with self._adding:
            if qube not in self._fds:
                self._add(qube)
        return self._fds[qube]

    def follow(self, qubes: Iterable[Qube]) -> None:
        """A new qube gets its namespace when it is needed."""

    def full_name(self, qube: str) -> str:
        """The name of a qube's namespace, which is made now if the qube is new."""
        self.namespace_fd(qube)
        return namespace_name(self._lab, qube)

    def entering(self, qube: str) -> Callable[[], AbstractContextManager[None]]:
        """What puts this thread into a qube's network, for a block without await."""
        fd = self.namespace_fd(qube)
        return lambda: self._within(fd)

    @contextmanager
    def _within(self, fd: int) -> Iterator[None]:
        _set_namespace(fd)
        try:
            yield
        finally:
            _set_namespace(self._home_fd)

    def batch(self, lines: Iterable[str], qube: str | None = None) -> None:
        """Lines for ``ip -batch``, in the network of a qube or of this machine. Raises `StoreError`."""
        text = "".join(f"{line}\n" for line in lines)
        if text:
            where = () if qube is None else ("-n", namespace_name(self._lab, qube))
            _run("ip", *where, "-batch", "-", text=text)

    def nft(self, qube: str, text: str, *options: str) -> str:
        """Load rules in a qube, all of them or none, and return what nft prints. Raises `StoreError`."""
        with self.entering(qube)():
            return _run("nft", *options, "-f", "-", text=text)

    def set_sysctls(self, qube: str, values: Mapping[str, object]) -> None:
        """Set kernel parameters below ``net`` in a qube, by their paths there. Raises OSError."""
        with self.entering(qube)():
            for path, value in values.items():
                Path("/proc/sys/net", path).write_text(f"{value}\n", encoding="ascii")

    def _add(self, *names: str) -> None:
        full_names = {name: namespace_name(self._lab, name) for name in names}
        self.batch(f"netns add {full_name}" for full_name in full_names.values())
        for name, full_name in full_names.items():
            self._fds[name] = os.open(_NAMED / full_name, os.O_RDONLY | os.O_CLOEXEC)
            with self._within(self._fds[name]):
                _bring_up("lo")

    def _connect_lan(self) -> None:
        lan, edge = (namespace_name(self._lab, name) for name in (LAN, EDGE))
        self.batch(
            [
                f"link add eth0 netns {lan} address {MACS[LAN]} type veth"
                f" peer name eth0 netns {edge} address {MACS[EDGE]}"
            ]
        )
        for name, addresses in ((LAN, LAN_ADDRESSES), (EDGE, EDGE_ADDRESSES)):
            lines = [f"address add {address}/24 dev eth0" for address in addresses if ":" not in address]
            if has_ipv6():
                # Without duplicate address detection the address can be bound at once.
                lines += [
                    f"address add {address}/64 dev eth0 nodad" for address in addresses if ":" in address
                ]
            self.batch(["link set eth0 up", *lines], name)


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
        paths = [entry for entry in _NAMED.iterdir() if entry.name.startswith(_prefix(lab))]
    except FileNotFoundError:
        return
    inodes = {path.stat().st_ino for path in paths}
    for process in Path("/proc").iterdir() if paths else ():
        if process.name.isdigit():
            with suppress(OSError):  # it has ended
                if (process / "ns" / "net").stat().st_ino in inodes:
                    os.kill(int(process.name), signal.SIGTERM)
    if paths:
        _run("ip", "-batch", "-", text="".join(f"netns delete {path.name}\n" for path in paths))


def _prefix(lab: LabDirectory) -> str:
    digest = hashlib.sha256(os.fsencode(lab.root.resolve())).hexdigest()
    return f"fwd{digest[:8]}-"


def has_ipv6() -> bool:
    """Whether this machine has IPv6 at all."""
    return Path("/proc/net/if_inet6").exists()


def _set_namespace(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        raise StoreError(f"setns: {os.strerror(ctypes.get_errno())}")


def _bring_up(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh", interface.encode(), _IFF_UP))


def _run(program: str, *arguments: str, text: str = "") -> str:
    words = " ".join((program, *arguments))
    try:
        done = subprocess.run(
            [program, *arguments],
            input=text,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env=os.environ | {"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"},
            check=False,
        )
    except FileNotFoundError:
        package = _PACKAGES[program]
        raise StoreError(
            f"the program {program!r} is missing; Debian has it in the package {package}"
        ) from None
    except OSError as error:
        raise StoreError(f"the program {program!r} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise StoreError(f"{words}: did not finish within {_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        raise StoreError(f"{words}: {' '.join(done.stderr.split())[:_MESSAGE_MAX]}")
    return done.stdout
