# SPDX-License-Identifier: GPL-2.0-or-later
"""Finding a service as the agent does, and reading its configuration."""

import os
import socket
from pathlib import Path

import pytest

from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.lab.rpcconfig import RpcConfig
from qubes_fwd_qrexec.lab.services import (
    Executable,
    ServiceMissingError,
    ServiceUnusableError,
    SocketService,
    TcpService,
    find_service,
)


class Place:
    """Three service directories and three of configuration."""

    def __init__(self, root: Path) -> None:
        self.services = [root / name for name in ("run", "local", "etc")]
        self.configs = [root / f"{name}-config" for name in ("run", "local", "etc")]
        for directory in (*self.services, *self.configs):
            directory.mkdir()

    def find(self, name: str) -> object:
        return find_service(self.services, self.configs, name)

    def executable(self, index: int, name: str) -> Path:
        path = self.services[index] / name
        path.touch(mode=0o755)
        return path

    def link(self, target: str, name: str = "s") -> None:
        (self.services[2] / name).symlink_to(target)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_first_directory_wins(place: Place) -> None:
    place.executable(2, "s")
    first = place.executable(0, "s")
    assert place.find("s+1") == Executable(first)


def test_service_with_argument_anywhere_wins_over_the_bare_one(place: Place) -> None:
    place.executable(0, "s")
    exact = place.executable(2, "s+1")
    assert place.find("s+1") == Executable(exact)


def test_dangling_link_hides_nothing(place: Place) -> None:
    (place.services[0] / "s").symlink_to("/nonexistent")
    behind = place.executable(2, "s")
    assert place.find("s+") == Executable(behind)


def test_missing_and_overlong_names_are_missing(place: Place) -> None:
    for name in ("s+", "x" * 300 + "+"):
        with pytest.raises(ServiceMissingError):
            place.find(name)


def test_file_that_cannot_be_executed_is_unusable(place: Place) -> None:
    (place.services[1] / "s").touch(mode=0o644)
    with pytest.raises(ServiceUnusableError, match="neither executable nor a socket"):
        place.find("s+")


def test_loop_of_links_is_unusable_and_not_missing(place: Place) -> None:
    place.link("s")
    place.executable(0, "t")
    with pytest.raises(ServiceUnusableError):
        place.find("s+")


def test_unix_socket_is_a_socket_service(place: Place) -> None:
    path = place.services[0] / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    (place.configs[1] / "s").write_text("exit-on-client-eof = true\n", encoding="utf-8")
    assert place.find("s+1") == SocketService(path, RpcConfig(exit_on_client_eof=True))


@pytest.mark.parametrize(
    ("target", "argument", "host", "port"),
    [
        ("/dev/tcp/127.0.0.1", "8080", "127.0.0.1", 8080),
        ("/dev/tcp/127.0.0.1/80", "", "127.0.0.1", 80),
        ("/dev/tcp", "10.0.0.1+443", "10.0.0.1", 443),
        ("/dev/tcp", "fd00++1+443", "fd00::1", 443),
        ("/dev/tcp/::1", "1", "::1", 1),
    ],
)
def test_tcp_link_takes_from_the_argument_what_it_leaves_open(
    place: Place, target: str, argument: str, host: str, port: int
) -> None:
    place.link(target)
    assert place.find(f"s+{argument}") == TcpService(host, port, RpcConfig())


@pytest.mark.parametrize(
    ("target", "argument"),
    [
        ("/dev/tcp/", "80"),
        ("/dev/tcp", "80"),
        ("/dev/tcp", "a_b+80"),
        ("/dev/tcp/127.0.0.1", ""),
        ("/dev/tcp/127.0.0.1", "080"),
        ("/dev/tcp/127.0.0.1", "65536"),
        ("/dev/tcp/127.0.0.1/80", "80"),
        ("/dev/tcp/localhost", "80"),
    ],
)
def test_tcp_link_that_does_not_add_up_is_unusable(place: Place, target: str, argument: str) -> None:
    place.link(target)
    with pytest.raises(ServiceUnusableError):
        place.find(f"s+{argument}")


def test_bad_configuration_makes_the_service_unusable(place: Place) -> None:
    place.executable(0, "s")
    (place.configs[0] / "s+1").write_text("junk\n", encoding="utf-8")
    with pytest.raises(ServiceUnusableError, match="junk"):
        place.find("s+1")
    assert isinstance(place.find("s+2"), Executable)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_unreadable_configuration_makes_the_service_unusable(place: Place) -> None:
    place.executable(0, "s")
    (place.configs[0] / "s").touch(mode=0)
    with pytest.raises(ServiceUnusableError, match="Permission denied"):
        place.find("s+1")


def test_configuration_is_read_as_the_agent_reads_it() -> None:
    text = "# c\n\nwait-for-session=1\nforce-user = 'user'  # x\nunknown.key=12\nexit-on-client-eof=false\r\n"
    assert RpcConfig.parse(text) == RpcConfig(wait_for_session=True, force_user="user")
    assert RpcConfig.parse("skip-service-descriptor=true\nexit-on-service-eof=true") == RpcConfig(
        skip_service_descriptor=True, exit_on_service_eof=True
    )


@pytest.mark.parametrize(
    "line",
    [
        " wait-for-session=1",
        "wait-for-session",
        "wait-for-session=2",
        "wait-for-session='1'",
        "exit-on-client-eof=1",
        "exit-on-client-eof=yes",
        "exit-on-client-eof=true x",
        "force-user=root",
        'force-user="root"',
        "force-user='''root'''",
        "force-user=1",
        "[section]",
        "1=2",
        "unknown=01",
        "unknown=99999999999999999999",
        "unknown=",
        "a=1\na=1",
        "force-user='u'\nskip-service-descriptor=true",
        "a='\0'",
    ],
)
def test_configuration_error_is_an_error(line: str) -> None:
    with pytest.raises(TextError):
        RpcConfig.parse(line)
