# SPDX-License-Identifier: GPL-2.0-or-later
"""The unit files: what they name is there, and systemd's own tool takes them as they are."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from bounds import BOUND_S

from qubes_fwd_qrexec.exposed.callbudget import CALLS_MAX
from qubes_fwd_qrexec.exposed.callqueue import WAITING_MAX
from qubes_fwd_qrexec.exposed.limits import PROCESS_MAX, process_max
from qubes_fwd_qrexec.exposed.listener import DRAIN_S
from qubes_fwd_qrexec.exposed.qrexec import STDERR_BUFFER_BYTES
from qubes_fwd_qrexec.exposed.supervisor import CLOSE_S
from qubes_fwd_qrexec.relay.budget import FLOOR_BYTES, LENT_BYTES
from qubes_fwd_qrexec.relay.socketbuffers import HELD_BYTES, MAX_BYTES, WAITING_BYTES
from qubes_fwd_qrexec.target.callnotes import DIRECTORY
from qubes_fwd_qrexec.target.handover import SOCKET
from qubes_fwd_qrexec.target.localserver import BUFFER_BYTES as SERVER_BUFFER_BYTES
from qubes_fwd_qrexec.target.singleservice import CALLS_MAX as SINGLES_MAX
from qubes_fwd_qrexec.target.singleservice import DRAIN_S as SERVICE_DRAIN_S
from qubes_fwd_qrexec.target.statusservice import STARTS

MIB = 1 << 20
ROOT = Path(__file__).parent.parent
UNITS = sorted([*ROOT.glob("systemd/*.service"), *ROOT.glob("systemd/*.socket")])
SERVICES = [unit for unit in UNITS if unit.suffix == ".service"]
OF_QUBES = [unit for unit in UNITS if "watch" not in unit.name]
# They wait for calls, and so for dom0's policy.
FOR_CALLS = ("qubes-forward-service.service", "qubes-forward-service.socket")
WITH_FLAG = [unit for unit in OF_QUBES if unit.name not in FOR_CALLS]
PROGRAMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
# Units of Qubes' that ours come after: qubes-core-qubesdb, -core-qrexec and -core-agent-linux.
OF_QUBES_OS = {
    "qubes-db.service",
    "qubes-iptables.service",
    "qubes-qrexec-agent.service",
    "qubes-sysinit.service",
    "qubesd.service",
}
BY_UNIT = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
BY_SERVICE = pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
BY_UNIT_WITH_FLAG = pytest.mark.parametrize("unit", WITH_FLAG, ids=lambda unit: unit.name)


def settings(unit: Path) -> dict[str, list[str]]:
    """The values of each key; raises AssertionError where a line is none of a unit file."""
    found: dict[str, list[str]] = {}
    sections = []
    for line in unit.read_text().splitlines():
        if re.fullmatch(r"\[[A-Z][a-z]+\]", line):
            sections.append(line)
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals, line
            assert sections, line
            assert re.fullmatch(r"[A-Z][A-Za-z0-9]+", key), line
            assert value == value.strip(), line
            found.setdefault(key, []).append(value)
    assert sections[0] == "[Unit]"
    assert len(sections) == len(set(sections))
    return found


def programs(unit: Path) -> set[str]:
    given = settings(unit)
    commands = given.get("ExecStart", []) + given.get("ExecStopPost", [])
    return {command.split()[0] for command in commands}


@BY_SERVICE
def test_each_program_is_one_that_is_installed(unit: Path) -> None:
    assert programs(unit)
    assert {Path(program).name for program in programs(unit)} <= PROGRAMS.keys()
    assert {Path(program).parent for program in programs(unit)} == {Path("/usr/bin")}


@BY_UNIT
def test_other_units_that_are_named_exist(unit: Path) -> None:
    given = settings(unit)
    named = {
        name
        for key in ("After", "Before", "Wants", "Requires", "BindsTo", "PartOf")
        for value in given.get(key, [])
        for name in value.split()
    }
    ours = {other.name for other in UNITS}
    assert {name for name in named if not name.endswith(".target")} <= ours | OF_QUBES_OS


@BY_UNIT_WITH_FLAG
def test_in_qubes_each_waits_for_a_flag_of_the_name_of_an_enabled_unit(unit: Path) -> None:
    conditions = settings(unit)["ConditionPathExists"]
    # Several are alternatives.
    assert [condition.startswith("|") for condition in conditions] == [len(conditions) > 1] * len(conditions)
    flags = [Path(condition.removeprefix("|")) for condition in conditions]
    assert {flag.parent for flag in flags} == {Path("/var/run/qubes-service")}
    enabled = {name.rpartition(".")[0] for name in preset()}
    assert {flag.name for flag in flags} <= enabled


def test_what_waits_for_calls_is_for_qubes_with_an_agent_alone() -> None:
    for unit in FOR_CALLS:
        given = settings(ROOT / "systemd" / unit)
        assert given["ConditionPathExists"] == ["/usr/lib/qubes/qrexec-agent"]


def preset() -> list[str]:
    lines = (ROOT / "systemd" / "70-qubes-forward.preset").read_text().splitlines()
    words = [line.split() for line in lines if not line.startswith("#")]
    assert all(verb == "enable" for verb, _ in words)
    return [name for _, name in words]


def test_the_preset_enables_just_what_can_be_enabled_in_qubes() -> None:
    assert sorted(preset()) == sorted(unit.name for unit in OF_QUBES if "WantedBy" in settings(unit))


@BY_SERVICE
def test_each_is_ready_when_it_says_so_and_has_time_to_drain(unit: Path) -> None:
    given = settings(unit)
    assert given["Type"] == ["notify"]
    leaves_drain = any("--leave-drain" in command for command in given["ExecStart"])
    assert given["KillMode"] == (["process"] if leaves_drain else ["mixed"])
    if unit.name == "qubes-forward-service.service":
        (stop,) = given["TimeoutStopSec"]
        assert int(stop.removesuffix("s")) > SERVICE_DRAIN_S


def test_the_listener_leaves_its_ports_at_once_and_its_drain_behind() -> None:
    given = settings(ROOT / "systemd" / "qubes-forward-listener.service")
    assert given["ExecStart"] == ["/usr/bin/qubes-forward-listener --leave-drain"]
    (stop,) = given["TimeoutStopSec"]
    assert CLOSE_S < int(stop.removesuffix("s")) < DRAIN_S
    # Its child says READY=1.
    assert given["NotifyAccess"] == ["all"]


@BY_SERVICE
def test_each_is_in_a_sandbox(unit: Path) -> None:
    given = settings(unit)
    assert given["ProtectSystem"] == ["strict"]
    assert given["NoNewPrivileges"] == ["yes"]
    assert "@system-service" in given["SystemCallFilter"]
    allowed = {
        "qubes-forward-listener.service": "CAP_NET_BIND_SERVICE",
        "qubes-forward-nft.service": "CAP_NET_ADMIN",
        "qubes-forward-service.service": "",
        "qubes-forward-watch.service": "CAP_DAC_OVERRIDE",
    }
    assert given["CapabilityBoundingSet"] == [allowed[unit.name]]
    if "watch" not in unit.name:
        assert given.get("AmbientCapabilities", [""]) == [allowed[unit.name]]
        assert given.get("DynamicUser") == ["yes"] or given["User"] == ["user"]
        assert {"LimitNOFILE", "TasksMax", "MemoryMax"} - given.keys() <= {"LimitNOFILE"}


def test_the_firewalls_program_sees_whose_sockets_the_kernel_lists() -> None:
    given = settings(ROOT / "systemd" / "qubes-forward-nft.service")
    (families,) = given["RestrictAddressFamilies"]
    assert "AF_NETLINK" in families.split()
    # In a user namespace all others are nobody, and each network namespace has sockets of its own.
    assert not {"PrivateUsers", "PrivateNetwork", "NetworkNamespacePath"} & given.keys()
    listener = settings(ROOT / "systemd" / "qubes-forward-listener.service")
    assert not {"PrivateUsers", "PrivateNetwork", "NetworkNamespacePath", "User"} & listener.keys()


def test_the_socket_is_where_the_program_looks_that_the_agent_starts() -> None:
    given = settings(ROOT / "systemd" / "qubes-forward-service.socket")
    assert given["ListenSequentialPacket"] == [SOCKET]
    (source,) = (ROOT / "handover").iterdir()
    assert f'#define SOCKET_PATH "{SOCKET}"' in source.read_text().splitlines()


def test_a_listener_that_starts_is_waited_for_where_its_unit_starts_one() -> None:
    given = settings(ROOT / "systemd" / "qubes-forward-listener.service")
    assert given["ConditionPathExists"] == [f"/var{STARTS}"]  # /var/run is a link to /run


def test_the_notes_of_mux_calls_are_where_the_service_writes_them_and_its_users() -> None:
    """They are others' too: the unit's end leaves them, and it may begin before the directory is there."""
    text = (ROOT / "tmpfiles.d" / "qubes-forward.conf").read_text()
    (line,) = [line for line in text.splitlines() if not line.startswith("#")]
    service = settings(ROOT / "systemd" / "qubes-forward-service.service")
    (user,) = service["User"]
    (name,) = service["RuntimeDirectory"]
    assert f"/run/{name}" == DIRECTORY
    assert line == f"d {DIRECTORY} {service['RuntimeDirectoryMode'][0]} {user} {user} -"


XEN_DEVICES = [
    f"/dev/xen/{name} rw" for name in ("evtchn", "gntalloc", "gntdev", "hypercall", "privcmd", "xenbus")
]
# What a promise rests on, unit by unit; a key that is not there must not be set.
TABLE: dict[str, dict[str, list[str] | None]] = {
    "qubes-forward-listener.service": {
        "User": None,
        "DynamicUser": ["yes"],
        "SupplementaryGroups": ["qubes"],
        # The sockets at which it is asked how it is; qubes.ForwardStatus runs as another user.
        "RuntimeDirectory": ["qubes-forward-listener"],
        "RuntimeDirectoryMode": ["0755"],
        # With DynamicUser= it would lie in /run/private, where nobody else could ask the listener.
        "RuntimeDirectoryPreserve": None,
        "Wants": ["qubes-forward-nft.service"],
        "Requires": None,
        "BindsTo": None,
        "ExecStopPost": None,
        "RestrictAddressFamilies": ["AF_UNIX AF_INET AF_INET6 AF_NETLINK"],
        "IPAddressDeny": None,
        # A vchan is made of them. PrivateDevices= would hide them, and so would any that is missing here:
        # the Xen libraries take no error for an answer but that there is no such device.
        "DevicePolicy": ["closed"],
        "DeviceAllow": XEN_DEVICES,
        "PrivateDevices": None,
        "PrivateNetwork": None,
        "ReadWritePaths": None,
        "Restart": ["on-failure"],
        "KillMode": ["process"],
    },
    "qubes-forward-nft.service": {
        "User": None,
        "DynamicUser": ["yes"],
        "SupplementaryGroups": None,
        "RuntimeDirectory": ["qubes-forward-nft"],
        "RuntimeDirectoryMode": ["0755"],
        "RuntimeDirectoryPreserve": None,
        "Wants": None,
        "Requires": None,
        # Without a listener it may have forwards by nft; and it lets nobody in where nobody listens.
        "BindsTo": None,
        "ExecStopPost": ["/usr/bin/qubes-forward-nft --remove"],
        "RestrictAddressFamilies": ["AF_NETLINK AF_UNIX"],
        "IPAddressDeny": ["any"],
        "DevicePolicy": None,
        "DeviceAllow": None,
        "PrivateDevices": ["yes"],
        "PrivateNetwork": None,
        "ReadWritePaths": None,
        "Restart": ["on-failure"],
        "KillMode": ["mixed"],
    },
    "qubes-forward-service.service": {
        # Who ends mux calls by signals is this user.
        "User": ["user"],
        "DynamicUser": None,
        "SupplementaryGroups": None,
        "RuntimeDirectory": ["qubes-forward"],
        "RuntimeDirectoryMode": ["0700"],
        "RuntimeDirectoryPreserve": ["yes"],
        "Wants": None,
        "Requires": ["qubes-forward-service.socket"],
        "BindsTo": None,
        "ExecStopPost": None,
        "RestrictAddressFamilies": ["AF_UNIX AF_INET AF_INET6"],
        # A server may be at any address of its qube, and on a UNIX socket anywhere.
        "IPAddressDeny": None,
        "PrivateTmp": None,
        "ProtectHome": ["read-only"],
        "DevicePolicy": None,
        "DeviceAllow": None,
        "PrivateDevices": ["yes"],
        # It would have a loopback of its own, without the servers of the qube.
        "PrivateNetwork": None,
        "ReadWritePaths": None,
        "Restart": ["on-failure"],
        "KillMode": ["mixed"],
    },
    "qubes-forward-service.socket": {
        "ListenStream": None,
        "SocketUser": ["user"],
        "SocketGroup": None,
        "SocketMode": ["0600"],
        "RemoveOnStop": ["yes"],
        "Accept": None,
    },
    "qubes-forward-watch.service": {
        "User": None,
        "Group": ["qubes"],
        "DynamicUser": None,
        "SupplementaryGroups": None,
        "RuntimeDirectory": None,
        "RuntimeDirectoryMode": None,
        "RuntimeDirectoryPreserve": None,
        "Wants": None,
        "Requires": None,
        "BindsTo": None,
        "ExecStopPost": None,
        "RestrictAddressFamilies": ["AF_UNIX"],
        "IPAddressDeny": ["any"],
        "DevicePolicy": ["closed"],
        "DeviceAllow": XEN_DEVICES,
        "PrivateDevices": None,
        "PrivateNetwork": ["yes"],
        "ReadWritePaths": ["/etc/qubes/policy.d /run/qubes -/var/log/qubes"],
        "Restart": ["on-failure"],
        "KillMode": ["mixed"],
    },
}


def test_every_unit_is_in_the_table() -> None:
    assert TABLE.keys() == {unit.name for unit in UNITS}


@BY_UNIT
def test_what_promises_rest_on_is_said(unit: Path) -> None:
    given = settings(unit)
    assert {key: given.get(key) for key in TABLE[unit.name]} == TABLE[unit.name]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="the program 'systemd-analyze' is missing")
def test_systemd_takes_every_line(tmp_path: Path) -> None:
    """With a program that is there in the place of ours, which is not installed."""
    for unit in UNITS:
        text = re.sub(r"/usr/bin/qubes-forward-\w+|/usr/bin/qvm-forward", "/bin/true", unit.read_text())
        (tmp_path / unit.name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / unit.name) for unit in UNITS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# What no constant says, in MiB: the program itself, and a client program of qrexec.
PROGRAM_MIB, CLIENT_MIB = 48, 3
# The program for all calls for one connection, which has no trio.
SINGLES_MIB = 24
# docs/numbers.md: at most 4 KiB for each connection that is held, and as much in the kernel for its socket.
CONNECTION_KIB = 8
# What comes at a gigabit a second, half of it read, until it is looked at again what the kernel holds.
SECOND_MIB = 64
# Beside what is asked for a socket holds the last segment that came in; see
# tests/relay/test_socketbuffers.py.
SEGMENT_KIB = 34


def memory_mib(unit: str) -> int:
    (text,) = settings(ROOT / "systemd" / unit)["MemoryMax"]
    number, suffix = int(text[:-1]), text[-1]
    return number * {"M": 1, "G": 1024}[suffix]


def streams_mib(streams: int) -> float:
    """The most that so many streams of a process need."""
    connections_mib = streams * CONNECTION_KIB / 1024
    budget_bytes = LENT_BYTES + streams * FLOOR_BYTES
    return connections_mib + (budget_bytes + HELD_BYTES) / MIB + SECOND_MIB


def test_the_listener_has_memory_for_all_that_its_bounds_let_it_hold() -> None:
    """And for the one before it, which drains in the same unit, and for the main process of both."""
    waiting_mib = WAITING_MAX * (2 * WAITING_BYTES / 1024 + SEGMENT_KIB) / 1024
    call_kib = 4 * MAX_BYTES / 1024 + SEGMENT_KIB + 2 * STDERR_BUFFER_BYTES / 1024
    calls_mib = CALLS_MAX * (CLIENT_MIB + call_kib / 1024)
    listener_mib = PROGRAM_MIB + streams_mib(PROCESS_MAX) + waiting_mib + calls_mib
    needed_mib = 2 * listener_mib + PROGRAM_MIB
    assert needed_mib <= memory_mib("qubes-forward-listener.service") <= 1.1 * needed_mib


def test_the_listener_may_have_a_file_for_each_connection_that_it_may_hold() -> None:
    (descriptors,) = settings(ROOT / "systemd" / "qubes-forward-listener.service")["LimitNOFILE"]
    assert process_max(int(descriptors)) == PROCESS_MAX


def test_dom0s_unit_is_enabled_by_a_preset_of_its_own_and_waits_for_a_flag_elsewhere() -> None:
    lines = (ROOT / "systemd" / "70-qubes-forward-dom0.preset").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["enable qubes-forward-watch.service"]
    (unit,) = (unit for unit in UNITS if unit.name == "qubes-forward-watch.service")
    # Either of the two.
    assert settings(unit)["ConditionPathExists"] == [
        "|/etc/qubes-release",
        "|/run/qubes-service/qubes-forward-watch",
    ]


def test_the_process_for_calls_has_memory_and_descriptors_for_all_of_them() -> None:
    unit = "qubes-forward-service.service"
    kernels_mib = SINGLES_MAX * (4 * SERVER_BUFFER_BYTES / 1024 + 2 * SEGMENT_KIB) / 1024
    needed_mib = SINGLES_MIB + kernels_mib
    assert needed_mib <= memory_mib(unit) <= 1.1 * needed_mib
    # Its sockets, stderr, the server's, its note, and that of the program which waits for its status.
    (files,) = settings(ROOT / "systemd" / unit)["LimitNOFILE"]
    assert int(files) >= 6 * SINGLES_MAX + 64
