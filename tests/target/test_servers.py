# SPDX-License-Identifier: GPL-2.0-or-later
"""What a target's owner says of servers: at which place one is, and when a port is refused."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.target.servers import (
    FILES_VARIABLE,
    LOCALHOSTS,
    Line,
    ServerAddress,
    Servers,
    ServersError,
)

Write = Callable[[str], Path]
V4, V6, UNIX = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX


@pytest.mark.usefixtures("name_servers")
def test_without_a_file_each_port_is_at_localhost() -> None:
    servers = Servers()
    for proto in Proto.BOTH.each:
        assert servers.addresses(proto, 8080) == LOCALHOSTS


@pytest.mark.parametrize(
    ("line", "addresses"),
    [
        ("tcp 8080 127.0.0.2", [ServerAddress(V4, "127.0.0.2")]),
        ("tcp 8000-9000 ::1", [ServerAddress(V6, "::1")]),
        ("tcp 8080 unix:/run/web.sock", [ServerAddress(UNIX, "/run/web.sock")]),
        ("tcp 8080 localhost", LOCALHOSTS),
        ("tcp 8080 lo", LOCALHOSTS),
        ("\ttcp  8080 lo # the web server", LOCALHOSTS),
        ("tcp 8081 127.0.0.2\n# tcp 8080 127.0.0.3\n\nudp 8080 127.0.0.4", LOCALHOSTS),
    ],
)
def test_a_port_that_is_named_is_there_and_nowhere_else(
    name_servers: Write, line: str, addresses: list[ServerAddress]
) -> None:
    name_servers(line)
    assert Servers().addresses(Proto.TCP, 8080) == tuple(addresses)


def test_a_range_names_its_first_and_its_last_port(name_servers: Write) -> None:
    name_servers("udp 50-60 127.0.0.2")
    servers = Servers()
    named = (ServerAddress(V4, "127.0.0.2"),)
    assert [servers.addresses(Proto.UDP, port) == named for port in (49, 50, 60, 61)] == [
        *(False, True, True, False)
    ]
    assert servers.addresses(Proto.TCP, 50) == LOCALHOSTS


WRONG = {
    "tcp 8080": "not of the form",
    "tcp 8080 eth0 10.0.0.1": "not of the form",
    "tcp 8080 unix:/run/a b": "not of the form",
    "tpc 8080 eth0": "neither tcp nor udp",
    "both 8080 eth0": "neither tcp nor udp",
    "TCP 8080 eth0": "neither tcp nor udp",
    "tcp 8080 10.137.0.300": "the place is none of",
    "tcp 8080 10.137.0.0/24": "the place is none of",
    "tcp 8080 fe80::1%eth0": "the place is none of",
    "tcp 8080 a-name-that-is-too-long": "the place is none of",
    "tcp 8080 0.0.0.0": "none at which",
    "tcp 8080 ::": "none at which",
    "tcp 8080 224.0.0.1": "none at which",
    "tcp 8080 fe80::1": "none at which",
    "tcp 8080 unix:run/web.sock": "begins with /",
    "tcp 8080 unix:": "begins with /",
    "tcp 8080 unix:/run/\0": "is printable",
    "tcp 8080-8081 unix:/run/web.sock": "a UNIX socket is for one port of tcp",
    "udp 8080 unix:/run/web.sock": "a UNIX socket is for one port of tcp",
    "tcp 8080 192.0.2.1": "does not have that address",
    "tcp 8080 2001:db8::1": "does not have that address",
    "tcp 8080 nosuch0": "no such interface",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_line_that_is_wrong_refuses_its_port_and_no_other(name_servers: Write, line: str) -> None:
    path = name_servers(f"# first\n{line}\ntcp 9000 lo\n")
    servers = Servers()
    proto = Proto.UDP if line.startswith("udp") else Proto.TCP
    with pytest.raises(ServersError, match=f"{path}:2: .*{WRONG[line]}") as caught:
        servers.addresses(proto, 8080)
    text = str(caught.value).replace(str(path), "")
    assert [word for word in line.split()[2:] if word in text and word != "eth0"] == []
    assert servers.addresses(proto, 8082) == LOCALHOSTS
    assert servers.addresses(Proto.TCP, 9000) == LOCALHOSTS


@pytest.mark.parametrize("line", ["tcp 80x80 eth0", "tcp", "tcp 9-8 lo", "tcp 0 lo", "tcp 080 lo", "?"])
def test_a_line_whose_ports_nobody_can_tell_may_be_about_any(name_servers: Write, line: str) -> None:
    name_servers(f"{line}\ntcp 8080 lo")
    with pytest.raises(ServersError, match=":1: "):
        Servers().addresses(Proto.TCP, 8080)
    if line.startswith("tcp"):
        assert Servers().addresses(Proto.UDP, 8080) == LOCALHOSTS


def test_two_lines_of_a_file_about_a_port_refuse_it(name_servers: Write) -> None:
    path = name_servers("tcp 8080 lo\ntcp 8000-8100 localhost\n")
    servers = Servers()
    with pytest.raises(ServersError, match=f"{path}:2: a line before it names the same port"):
        servers.addresses(Proto.TCP, 8080)
    assert servers.addresses(Proto.TCP, 8000) == LOCALHOSTS


def test_the_qubes_own_lines_win_over_its_templates_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, template = tmp_path / "own", tmp_path / "template"
    monkeypatch.setenv(FILES_VARIABLE, f"{own}:{template}")
    template.write_text("tcp 80-90 127.0.0.2\ntcp 9-8 lo")
    own.write_text("tcp 80 127.0.0.3\ntcp 81 nosuch0")
    servers = Servers()
    assert servers.addresses(Proto.TCP, 80) == (ServerAddress(V4, "127.0.0.3"),)
    with pytest.raises(ServersError, match=f"{own}:2: "):
        servers.addresses(Proto.TCP, 81)
    with pytest.raises(ServersError, match=f"{template}:2: "):
        servers.addresses(Proto.TCP, 82)


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_may_write_refuses_what_it_names(name_servers: Write, mode: int) -> None:
    path = name_servers("tcp 8080 lo")
    path.chmod(mode)
    with pytest.raises(ServersError, match=f"{path}:1: others than root may write"):
        Servers().addresses(Proto.TCP, 8080)
    assert Servers().addresses(Proto.TCP, 8081) == LOCALHOSTS


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file to somebody else")
def test_a_file_of_somebody_else_refuses_what_it_names(name_servers: Write) -> None:
    path = name_servers("tcp 8080 lo")
    os.chown(path, 65534, 0)
    with pytest.raises(ServersError, match=f"{path}:1: others than root may write"):
        Servers().addresses(Proto.TCP, 8080)
    assert Servers().addresses(Proto.UDP, 8080) == LOCALHOSTS


def unreadable(path: Path) -> str:
    path.mkdir()
    return "Is a directory"


def a_pipe(path: Path) -> str:
    os.mkfifo(path)
    return "it is no file"


def too_long(path: Path) -> str:
    path.write_text("#" * 65_537)
    return "at most 65536 bytes"


def not_ascii(path: Path) -> str:
    path.write_text("tcp 8080 l\u00f6")
    return "not ASCII"


@pytest.mark.parametrize("make", [unreadable, a_pipe, too_long, not_ascii])
def test_a_file_that_cannot_be_read_refuses_every_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], str]
) -> None:
    path = tmp_path / "servers.conf"
    monkeypatch.setenv(FILES_VARIABLE, str(path))
    problem = make(path)
    for proto in Proto.BOTH.each:
        with pytest.raises(ServersError, match=f"{path}: .*{problem}"):
            Servers().addresses(proto, 1)


def test_a_change_of_a_file_counts_from_the_next_connection_on(name_servers: Write) -> None:
    servers = Servers()
    assert servers.addresses(Proto.TCP, 80) == LOCALHOSTS
    path = name_servers("tcp 80 127.0.0.2")
    assert servers.addresses(Proto.TCP, 80) == (ServerAddress(V4, "127.0.0.2"),)
    new = path.with_name("new")
    new.write_text("tcp 80 127.0.0.3")
    new.rename(path)
    assert servers.addresses(Proto.TCP, 80) == (ServerAddress(V4, "127.0.0.3"),)
    path.unlink()
    assert servers.addresses(Proto.TCP, 80) == LOCALHOSTS


def test_a_reason_is_told_once_until_a_file_changes(name_servers: Write) -> None:
    path = name_servers("tcp 80 nosuch0")
    told: list[str] = []
    servers = Servers(told.append)
    for text in ("tcp 80 nosuch0", "tcp 80-81 nosuch0"):
        name_servers(text)
        for _ in range(3):
            with pytest.raises(ServersError):
                servers.addresses(Proto.TCP, 80)
    assert told == [f"{path}:1: this qube has no such interface, or that has no address"] * 2


@given(st.text(st.sampled_from("tcpudp 0189-./:unixeth#%\x00"), max_size=40))
def test_any_line_is_read_or_has_a_problem(text: str) -> None:
    line = Line.parse(text, "FILE:1")
    assert line.protos
    assert line.problem or (len(text.split()) == 3 and line.where == text.split()[2])
