# SPDX-License-Identifier: GPL-2.0-or-later
"""Each thing that can be wrong on the way of a forward, made so in a lab, and found by diagnose."""

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from answered import REPORT
from helpers import free_port

from qubes_fwd_qrexec.common.config import Service
from qubes_fwd_qrexec.common.report import (
    Firewall,
    FirewallReport,
    ListenerReport,
    QubeReport,
    dump,
)
from qubes_fwd_qrexec.common.services import SERVERS_FILE, STATUS_SERVICE
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab import daemon
from qubes_fwd_qrexec.lab.knobs import Knobs
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.lab.session import open_session

from .diagnosed_lab import ALL, BOUND_S, Lab

OPEN, CLOSED, UNKNOWN = Firewall


@pytest.fixture
def lab() -> Iterator[Lab]:
    with open_session(daemon.Network.LOOPBACK) as session, ExitStack() as undo:
        yield Lab(session, undo)


def test_a_forward_that_works_is_well_at_every_step(lab: Lab) -> None:
    lab.add()
    lab.listen()
    lab.pass_through()
    steps = lab.diagnose()
    assert [step["step"] for step in steps] == ALL
    assert {step["step"]: step["verdict"] for step in steps if step["verdict"] != "ok"} == {
        "firewall": "unknown"
    }
    status, said = lab.run("diagnose", "work", "web")
    assert status == 0
    assert said.splitlines()[0] == "ok       rule          work web is active"
    assert said.splitlines()[-1].startswith("Everything on the way to the server works.")


def test_a_forward_of_calls_over_the_stock_service_is_walked_too(lab: Lab) -> None:
    lab.port = free_port()
    words = f"{lab.port}:{lab.server.getsockname()[1]}"
    assert lab.run("add", "personal", words, "--from=any", "--listen=127.0.0.1", "--name=web")[0] == 0
    lab.listen()
    status, said = lab.run("diagnose", "personal", "web", "--json")
    verdicts = {step["step"]: step["verdict"] for step in json.loads(said)["steps"]}
    assert status == 0
    assert (verdicts["service"], verdicts["server"]) == ("unknown", "unknown")
    # The server neither answers nor ends the connection, and a call does not tell of it.
    assert verdicts["round trip"] == "unknown"
    lab.server.close()
    status, said = lab.run("diagnose", "personal", "web")
    assert status == 1
    assert "exit status 125" in said
    assert "What helps: make sure that the server in personal is running and listens on 127.0.0.1" in said


def test_a_server_that_listens_at_another_address_is_reached_once_its_owner_says_so(lab: Lab) -> None:
    port = lab.server.getsockname()[1]
    lab.server.close()
    lab.server = socket.create_server(("127.0.0.2", port))
    with lab.server:
        lab.server.settimeout(BOUND_S)
        lab.add()
        lab.listen()
        said = lab.wrong("server")
        assert f"a server listens at 127.0.0.2 | write 'tcp {port} ADDRESS' in {SERVERS_FILE} in work" in said
        path = lab.lab.qube_dir("work").servers_files[0]
        path.parent.mkdir(parents=True)
        path.write_text(f"tcp {port} 127.0.0.2\n")
        lab.pass_through()
        (server,) = [step["text"] for step in lab.diagnose() if step["step"] == "server"]
        assert server.endswith(f"; calls get to 127.0.0.2, as {path}:1 says")


def test_whom_a_name_lets_in_now_is_told(lab: Lab) -> None:
    words = ("add", "work", "80", "--internal", "--from=personal", "--name=web")
    assert lab.run(*words)[0] == 0
    told = lab.run("diagnose", "work", "web")[1].splitlines()[1]
    assert told.split(maxsplit=2)[:2] == ["ok", "sources"]
    assert told.endswith("personal (10.137.0.11 fd09:24ef:4179::a89:b) may connect")
    lab.lab.write_qube(replace(lab.lab.qube("personal"), netvm=QubeName("sys-vpn")))
    assert "What helps: 'qvm-forward set work web via=sys-vpn' or" in lab.run("diagnose", "work", "web")[1]


def test_a_rule_that_is_not_live(lab: Lab) -> None:
    lab.add("--disabled")
    assert "'qvm-forward enable work web'" in lab.wrong("rule")
    assert lab.run("diagnose", "work", "nothing")[0] == 1
    lab.lab.set_feature("work", "forward.web", "nonsense")
    assert "'qvm-forward remove" in lab.wrong("rule")


def test_what_helps_after_a_netvm_change_is_not_refused(lab: Lab) -> None:
    lab.add()
    work = lab.lab.qube("work")
    lab.lab.write_qube(replace(work, netvm=QubeName("sys-vpn")))
    helps = lab.wrong("rule")
    assert (
        "'qvm-forward set work web via=sys-vpn' or 'qvm-forward set work web bypass-tunnel=yes', "
        "then 'qvm-forward confirm work web'"
    ) in helps
    for words in re.findall("'qvm-forward ([^']*)'", helps.rpartition(" | ")[2]):
        assert lab.run(*words.split())[0] == 0, words


def test_an_exposed_qube_that_is_halted(lab: Lab) -> None:
    lab.add()
    lab.lab.set_state("sys-net", QubeState.HALTED)
    assert "'qvm-start sys-net'" in lab.wrong("exposed qube")


def test_a_rule_that_is_not_applied(lab: Lab) -> None:
    lab.add("--no-apply")
    said = lab.wrong("applied")
    line = f"qubes.ForwardTCP  +{lab.server.getsockname()[1]}+mux  sys-net  work  allow"
    assert f"dom0's policy lacks '{line}" in said
    assert "; sys-net has no configuration for it | 'qvm-forward apply'" in said
    assert lab.run("apply")[0] == 0
    lab.lab.set_feature("sys-net", "vm-config.fwd.work.web", "nonsense")
    assert lab.wrong("applied") == "sys-net has another configuration for it | 'qvm-forward apply'"


def test_no_listener_installed_none_running_and_none_that_can_be_asked(lab: Lab) -> None:
    lab.add()
    lab.lab.set_feature("sys-net", f"supported-rpc.{Service.FORWARD_TCP}", "")
    # What it answers is newer than what its template has told.
    assert "no listener is running | 'qvm-service sys-net qubes-forward-listener on'" in lab.wrong("listener")
    lab.answers("sys-net", b"\x1b[2J")
    assert "the answer of sys-net cannot be read" in lab.wrong("listener")
    lab.remove_service("sys-net", STATUS_SERVICE)
    said = lab.wrong("listener")
    assert (
        "sys-net does not have qubes.ForwardStatus | install or update qubes-fwd-qrexec in fedora-42" in said
    )


def test_a_port_that_another_program_has(lab: Lab) -> None:
    lab.listen()
    with socket.create_server(("127.0.0.1", lab.port)):
        lab.add()
        said = lab.wrong("listener")
        assert "the port is in use by" in said
        assert "or choose another port or address: 'qvm-forward set work web srcports=PORT'" in said
        status, said = lab.run("status")
        assert (status, "work  web   waiting  " in said) == (1, True)
        assert "work web is waiting: sys-net does not have it open: " in said
        assert "the port is in use by" in said


def test_what_the_listener_cannot_open_is_said_by_the_command_that_asks_for_it(
    lab: Lab,
) -> None:
    lab.listen()
    with socket.create_server(("127.0.0.1", lab.port)):
        words = ("work", f"{lab.port}:80", "--from=any", "--listen=127.0.0.1", "--name=web")
        status, said = lab.run("add", *words)
        assert status == 0
        assert "Note: sys-net does not have it open: " in said
        assert "the port is in use by" in said


def test_a_firewall_that_drops_clients(lab: Lab) -> None:
    lab.add()
    lab.listen()
    lab.firewall(CLOSED, OPEN)  # it listens by IPv4 alone
    said = lab.wrong("firewall")
    assert "the firewall of sys-net drops what comes over IPv4 | " in said
    assert "'systemctl status qubes-forward-nft' in sys-net" in said
    lab.firewall(OPEN, CLOSED)
    lab.pass_through()
    steps = lab.diagnose()
    assert {step["verdict"] for step in steps} == {"ok"}
    assert "the firewall of sys-net lets clients in over IPv4" in [step["text"] for step in steps]


def test_a_port_that_the_firewall_keeps_closed_for_want_of_the_listener(lab: Lab) -> None:
    lab.add()
    lab.listen()
    lab.firewall(OPEN, OPEN, "fwd.work.other")
    lab.pass_through()
    assert {step["verdict"] for step in lab.diagnose()} == {"ok"}
    lab.firewall(OPEN, OPEN, "fwd.work.other", "fwd.work.web")
    assert "lets nobody in to a port that the listener does not listen on" in lab.wrong("firewall")


IPV4 = ("--from=192.168.0.0/16",)
IPV6 = ("--from=fd00::/8",)
BOTH = (*IPV4, *IPV6)


@pytest.mark.parametrize(
    ("sources", "ip", "ip6", "verdict", "words"),
    [
        (IPV4, OPEN, CLOSED, "ok", "lets clients in over IPv4"),
        (IPV6, OPEN, CLOSED, "stops", "drops what comes over IPv6"),
        (IPV6, CLOSED, OPEN, "ok", "lets clients in over IPv6"),
        (IPV6, OPEN, UNKNOWN, "unknown", "does not say whether it lets clients in over IPv6"),
        (BOTH, OPEN, OPEN, "ok", "lets clients in over IPv4 and IPv6"),
        (BOTH, CLOSED, CLOSED, "stops", "drops what comes over IPv4 and IPv6"),
        (BOTH, OPEN, CLOSED, "unknown", "lets clients in over IPv4, drops what comes over IPv6"),
        (BOTH, CLOSED, OPEN, "unknown", "lets clients in over IPv6, drops what comes over IPv4"),
        (
            BOTH,
            CLOSED,
            UNKNOWN,
            "unknown",
            "drops what comes over IPv4, does not say whether it lets clients in over IPv6",
        ),
    ],
)
def test_the_firewall_is_asked_for_the_families_that_the_forward_listens_on(
    lab: Lab, sources: tuple[str, ...], ip: Firewall, ip6: Firewall, verdict: str, words: str
) -> None:
    ports = f"{lab.port}:{lab.server.getsockname()[1]}"
    status, said = lab.run("add", "work", ports, *sources, "--name=web")
    assert status == 0, said
    told = FirewallReport(ip, ip6)
    listener = ListenerReport(since=1, forwards=(REPORT,))
    lab.answers("sys-net", dump(QubeReport(program="1", listener=listener, firewall=told).as_json()))
    (step,) = [step for step in lab.diagnose() if step["step"] == "firewall"]
    assert (step["verdict"], step["text"]) == (verdict, f"the firewall of sys-net {words}")


def test_a_listener_that_has_another_configuration(lab: Lab) -> None:
    lab.add()
    listener = ListenerReport(since=1, forwards=())
    lab.answers("sys-net", dump(QubeReport(program="1", listener=listener).as_json()))
    assert "sys-net does not have it open yet" in lab.wrong("listener")


def test_a_policy_that_denies(lab: Lab) -> None:
    lab.add()
    lab.listen()
    before = lab.lab.policy_dir / "20-before.policy"
    before.write_text("qubes.ForwardTCP  *  @anyvm  @anyvm  deny\n")
    said = lab.wrong("policy")
    assert "20-before.policy" in said
    assert "'qubes-policy-lint'" in said


def test_a_target_that_is_halted(lab: Lab) -> None:
    lab.add()
    lab.listen()
    lab.lab.set_state("work", QubeState.HALTED)
    assert "'qvm-start work'" in lab.wrong("target")
    assert lab.run("set", "work", "web", "autostart=yes")[0] == 0
    assert [step["step"] for step in lab.diagnose()][-2:] == ["target", "service"]
    assert not lab.lab.qube("work").is_running


def test_a_target_without_the_service(lab: Lab) -> None:
    lab.add()
    lab.listen()
    lab.remove_service("work", Service.FORWARD_TCP)
    assert "does not have the service (exit status 127)" in (said := lab.wrong("round trip"))
    assert "install or update qubes-fwd-qrexec in fedora-42" in said
    lab.remove_service("work", STATUS_SERVICE)
    assert "work does not have qubes.ForwardStatus" in lab.wrong("service")
    assert lab.run("set", "work", "web", "transport=mux")[0] == 0
    lab.lab.set_feature("work", f"supported-rpc.{Service.FORWARD_TCP}", "")
    assert "work web is refused." in lab.wrong("rule")


def test_a_qube_that_takes_no_calls_and_a_lab_that_is_down(lab: Lab) -> None:
    lab.add()
    lab.lab.write_knobs(Knobs(calls_per_target=0))
    said = lab.wrong("listener")
    assert "ended with exit status 126 | sys-net may not take any more calls" in said
    daemon.stop(lab.lab)
    assert "the lab is down; 'qvm-forward-lab up' starts it | 'qvm-forward-lab up'" in lab.wrong("listener")


def test_a_range_is_said_to_be_ports(lab: Lab) -> None:
    first = lab.port
    lab.add()
    assert lab.run("set", "work", "web", f"srcports={first}-{first + 1}", "dstports=1-2")[0] == 0
    listener = ListenerReport(since=1, forwards=(REPORT,))
    lab.answers("sys-net", dump(QubeReport(program="1", listener=listener).as_json()))
    found = next(step for step in lab.diagnose() if step["step"] == "listener")
    assert found["text"] == f"sys-net listens on ports {first}-{first + 1}"


def test_a_server_that_does_not_listen(lab: Lab) -> None:
    lab.add()
    lab.listen()
    lab.server.close()
    said = lab.wrong("server")
    assert "Connection refused" in said
    assert "start the server in work" in said


def test_a_call_that_hangs_is_not_taken_for_one_that_comes_through(lab: Lab) -> None:
    lab.add()
    lab.listen()
    service = lab.service("work", Service.FORWARD_TCP)
    service.write_text("#!/bin/sh\nexec 3>&1\nexec cat >/dev/null\n")
    service.chmod(0o755)
    last = lab.diagnose()[-1]
    assert (last["step"], last["verdict"]) == ("round trip", "unknown")
    assert "no answer within 3 s" in last["text"]


def test_no_qube_may_ask_another(lab: Lab) -> None:
    lab.add()
    client = [str(lab.lab.client_program), f"--agent-socket={lab.lab.qube_dir('sys-net').agent_socket}"]
    (lab.lab.policy_dir / "90-other.policy").write_text(f"{STATUS_SERVICE} * @anyvm @anyvm allow\n")
    words = [*client, "--", "work", f"{STATUS_SERVICE}+"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=BOUND_S, check=False)
    assert (done.returncode, done.stdout) == (126, b"")


def test_status_shows_what_the_qubes_say(lab: Lab) -> None:
    lab.add()
    lab.listen()
    with socket.create_connection(("127.0.0.1", lab.port), timeout=BOUND_S) as client:
        client.sendall(b"12345")
        far, _ = lab.server.accept()
        with far:
            far.settimeout(BOUND_S)
            far.recv(5)
            status, said = lab.run("status", "--json")
            (entry,) = json.loads(said)["forwards"]
            figures = entry["figures"]
            assert status == 0
            assert (figures["connections"], figures["sent"], figures["way"]) == (1, 5, "open")
            assert figures["mux_calls_in_target"] == 1
