# SPDX-License-Identifier: GPL-2.0-or-later
"""Over /proc as it is, and over one that is written down."""

import os
import pwd
import socket
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest
from helpers import port_of

from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.system.portholder import port_holder

_HOLD = (
    "import socket, sys; from pathlib import Path; Path('/proc/self/comm').write_text('port-holder')\n"
    "s = socket.create_server((sys.argv[1], 0), family=int(sys.argv[2])); print(s.getsockname()[1])\n"
    "sys.stdout.flush(); sys.stdin.read()"
)
HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("::1", "::")],
)
def test_the_program_that_listens_is_named(theirs: str, ours: str) -> None:
    family = socket.AF_INET6 if ":" in theirs else socket.AF_INET
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, theirs, str(int(family))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        port = int(holder.stdout.readline())
        assert port_holder(ip_address(ours), port) == f"port-holder (process {holder.pid})"
        assert holder.stdin is not None
        holder.stdin.close()


def test_our_own_is_not_named_as_another_program() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        assert "this program itself" in str(port_holder(ip_address("127.0.0.1"), port_of(sock)))


def test_a_port_of_udp_is_another_one() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        socket.socket(type=socket.SOCK_DGRAM) as far,
    ):
        sock.bind(("127.0.0.1", 0))
        far.connect(sock.getsockname())
        here = ip_address("127.0.0.1")
        assert "this program itself" in str(port_holder(here, port_of(sock), proto=Proto.UDP))
        assert port_holder(here, port_of(sock)) is None
        assert port_holder(here, port_of(far), proto=Proto.UDP) is None


def test_a_connection_is_no_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, socket.create_connection(sock.getsockname()) as far:
        assert port_holder(ip_address("127.0.0.1"), port_of(far)) is None


def proc(directory: Path, address: str, *, uid: int = 0, table: str = "tcp") -> Path:
    (directory / "net").mkdir()
    line = f"   0: {address}:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000 {uid:5} 0 777 1 0\n"
    (directory / "net" / table).write_text(HEAD + line)
    return directory


def process(directory: Path, pid: int, name: str, *links: str) -> None:
    fds = directory / str(pid) / "fd"
    fds.mkdir(parents=True)
    (directory / str(pid) / "comm").write_text(f"{name}\n")
    for number, link in enumerate(links):
        (fds / str(number)).symlink_to(link)


V4 = ip_address("192.0.2.1")


def hexed(*words: int) -> str:
    return "".join(f"{int.from_bytes(word.to_bytes(4, 'big'), sys.byteorder):08X}" for word in words)


def test_of_several_processes_the_first_one_is_named(tmp_path: Path) -> None:
    proc(tmp_path, hexed(int(V4)))
    process(tmp_path, 100, "child", "socket:[777]")
    process(tmp_path, 20, "parent", "pipe:[777]", "socket:[777]")
    process(tmp_path, 3, "other", "socket:[7777]")
    assert port_holder(V4, 80, tmp_path) == "parent (process 20)"


def test_where_processes_are_hidden_the_user_is_named(tmp_path: Path) -> None:
    proc(tmp_path, hexed(int(V4)), uid=os.getuid())
    (tmp_path / "20").mkdir()
    assert port_holder(V4, 80, tmp_path) == f"a program of user {pwd.getpwuid(os.getuid()).pw_name}"


def test_a_user_without_a_name_is_a_number(tmp_path: Path) -> None:
    assert port_holder(V4, 80, proc(tmp_path, hexed(int(V4)), uid=54321)) == "a program of user 54321"


@pytest.mark.parametrize(
    ("table", "theirs", "ours", "is_it"),
    [
        ("tcp", hexed(0), "192.0.2.1", True),
        ("tcp", hexed(int(V4)), "0.0.0.0", True),
        ("tcp", hexed(int(V4)), "192.0.2.2", False),
        ("tcp", hexed(0), "::", False),
        ("tcp6", hexed(0, 0, 0, 0), "192.0.2.1", True),
        ("tcp6", hexed(0, 0, 0xFFFF, int(V4)), "192.0.2.1", True),
        ("tcp6", hexed(0x20010DB8, 0, 0, 1), "2001:db8::1", True),
        ("tcp6", hexed(0x20010DB8, 0, 0, 1), "2001:db8::2", False),
    ],
)
def test_only_what_is_in_the_way_is_named(
    tmp_path: Path, table: str, theirs: str, ours: str, is_it: bool
) -> None:
    found = port_holder(ip_address(ours), 80, proc(tmp_path, theirs, uid=1, table=table))
    assert (found is not None) is is_it
    assert port_holder(ip_address(ours), 81, tmp_path) is None


def test_where_nothing_can_be_read_nothing_is_known(tmp_path: Path) -> None:
    assert port_holder(V4, 80, tmp_path) is None
