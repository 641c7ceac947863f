# SPDX-License-Identifier: GPL-2.0-or-later
"""What runs in a qube ends with it, wherever it went; and nothing of a lab outlives the lab."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from helpers import until

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.lab import daemon, netns
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.cli import main
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.inhabitants import VARIABLE, end_inhabitants, inhabitants
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.lab.running import RunningLab, client_command

from .lab_calls import bounded_lab, calling, give_service, read_exactly
from .lab_up import kill_broker

# Leaves the process group and session that it was started in, says its pid, and ends the call.
DETACHED = "setsid sh -c '{first} echo $$; exec sleep 1000 <&- >/dev/null 2>&1' &"
STUBBORN = 'trap "" TERM HUP;'


needs_netns = pytest.mark.skipif(
    netns.why_unavailable() is not None, reason=f"no namespaces here: {netns.why_unavailable()}"
)


def namespaces_of(lab: LabDirectory) -> list[Path]:
    return list(Path("/run/netns").glob(netns.namespace_name(lab, "*")))


def wait_until(condition: object) -> None:
    trio.run(until, condition)


def is_alive(pid: int) -> bool:
    """Whether it runs: what has ended may wait for a parent that is in no hurry."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[LabDirectory]:
    lab = create_lab(tmp_path / "lab")
    (lab.policy_dir / "30-test.policy").write_text("test.Service * @anyvm @anyvm allow\n", encoding="utf-8")
    yield lab
    if lab.root.exists():
        daemon.stop(lab)


def detached_service(lab: LabDirectory, first: str = "") -> tuple[subprocess.Popen[bytes], int]:
    service = lab.qube_dir("work").service_dirs[0] / "test.Service"
    service.write_text(f"#!/bin/sh\n{DETACHED.format(first=first)}\n", encoding="utf-8")
    service.chmod(0o755)
    client = subprocess.Popen(
        [*client_command(lab, "sys-net"), "work", "test.Service"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert client.stdout is not None
    return client, int(client.stdout.readline())


def end(client: subprocess.Popen[bytes]) -> None:
    client.kill()
    client.communicate()


def program_in(place: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={VARIABLE: str(place)}
    )


def test_inhabitants_are_told_by_their_qube_and_by_their_lab(tmp_path: Path) -> None:
    work = tmp_path / "lab" / "qubes" / "work"
    with program_in(work) as one, program_in(work.with_name("workshop")) as other:
        wait_until(lambda: inhabitants(work))
        assert inhabitants(work) == [one.pid]
        wait_until(lambda: len(inhabitants(tmp_path / "lab")) == 2)
        assert inhabitants(tmp_path / "la") == []
        end_inhabitants(work)
        assert one.wait() == -signal.SIGTERM
        assert other.poll() is None
        end_inhabitants(tmp_path / "lab")
        assert other.wait() == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_no_process_outlives_a_broker_that_is_told_to_end(lab: LabDirectory, number: signal.Signals) -> None:
    broker = daemon.start(lab, daemon.Network.LOOPBACK)
    client, service = detached_service(lab)
    os.kill(broker, number)
    wait_until(lambda: not is_alive(service))
    wait_until(lambda: daemon.broker_pid(lab) is None)
    assert not lab.control_socket.exists()
    end(client)


def test_down_ends_what_a_killed_broker_left(lab: LabDirectory) -> None:
    broker = daemon.start(lab, daemon.Network.LOOPBACK)
    client, service = detached_service(lab, STUBBORN)
    os.kill(broker, signal.SIGKILL)
    end(client)
    wait_until(lambda: daemon.broker_pid(lab) is None)
    assert is_alive(service)
    daemon.stop(lab)
    assert not is_alive(service)


def test_lab_ends_when_its_directory_is_deleted(lab: LabDirectory) -> None:
    broker = daemon.start(lab, daemon.Network.LOOPBACK)
    client, service = detached_service(lab)
    shutil.rmtree(lab.root)
    wait_until(lambda: not is_alive(broker))
    assert not is_alive(service)
    end(client)


@pytest.mark.parametrize("network", [pytest.param("namespaces", marks=needs_netns), "loopback"])
def test_what_a_killed_broker_left_ends_by_down_also_when_the_directory_is_gone(
    network: str, lab: LabDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = daemon.start(lab, daemon.Network(network))
    client, service = detached_service(lab, STUBBORN)
    kill_broker(lab, broker)
    end(client)
    shutil.rmtree(lab.root)
    assert is_alive(service)
    assert main(["--lab", str(lab.root), "down"]) == 1
    assert "not a lab: lab.json is missing" in capsys.readouterr().err
    assert not is_alive(service)
    assert namespaces_of(lab) == []


@needs_netns
def test_lab_whose_directory_is_deleted_takes_its_networks_with_it(lab: LabDirectory) -> None:
    broker = daemon.start(lab, daemon.Network.NAMESPACES)
    assert namespaces_of(lab) != []
    shutil.rmtree(lab.root)
    wait_until(lambda: not is_alive(broker))
    assert namespaces_of(lab) == []


@pytest.mark.parametrize("halted", ["work", "sys-net"])
async def test_qube_that_is_halted_by_its_description_ends_its_calls(tmp_path: Path, halted: str) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "echo up; exec cat >/dev/null")
        give_service(lab, "echo up; exec cat", qube="vault")
        async with calling(lab) as call, calling(lab, "vault", qube="personal") as other:
            for one in (call, other):
                assert await read_exactly(one.stdout, 3) == b"up\n"
            file = lab.directory.qube_dir(halted).file
            file.write_text(file.read_text().replace('"Running"', '"Halted"'))
            assert await call.status() == 255
            await until(lambda: lab.broker.used_slots() == {"vault": 1})
            await other.stdin.send_all(b"still here")
            assert await read_exactly(other.stdout, 10) == b"still here"


def has_no_configuration(lab: RunningLab) -> bool:
    try:
        return lab.directory.vm_config("work") == {}
    except StoreError:  # it is being made anew
        return False


async def test_qube_that_is_halted_takes_its_servers_and_its_configuration_with_it(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        place = lab.directory.qube_dir("work")
        lab.directory.set_feature("work", "vm-config.fwd.x", "y")
        server = await trio.lowlevel.open_process(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={VARIABLE: str(place.root)}
        )
        await until(lambda: inhabitants(place.root))
        place.file.write_text(place.file.read_text().replace('"Running"', '"Halted"'))
        assert await server.wait() == -signal.SIGTERM
        await until(lambda: has_no_configuration(lab))
        lab.directory.set_state("work", QubeState.RUNNING)
        assert lab.directory.vm_config("work") == {"fwd.x": "y"}
        await server.stdin.aclose()  # type: ignore[union-attr]
