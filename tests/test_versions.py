# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may be older than whom: what each release said stands here as it was said, and is understood.

A later release adds its own words beside these, and keeps these for as long as the release that said them
is the one before it.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fakeclient import FakeClient
from helpers import accept, connect, echo_once, free_port, is_reset, port_of, running_listener
from helpers import write_config as configure

from qubes_fwd_qrexec.common import allowance, clientreport, exchange, report, rulexml
from qubes_fwd_qrexec.common.config import ListenerConfig, Service, Side
from qubes_fwd_qrexec.common.errors import ConfigError, RuleError, TextError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.rules import ForwardRule, NamedRule, Transport
from qubes_fwd_qrexec.common.values import QubeName, RuleName, Sources, TargetPorts
from qubes_fwd_qrexec.mux import Hello, wire
from qubes_fwd_qrexec.target import localserver, statusservice
from qubes_fwd_qrexec.target.localserver import ServiceError

KEY = "fwd.work.web"

# dom0 to the exposed qube

CONFIG_0_1 = (
    "version=1 service=qubes.ForwardTCP transport=mux side=outer "
    "listen=0.0.0.0 srcports=80-80 dstports=8080-8080 "
    "srchosts=192.168.0.0/16",
    "version=1 service=qubes.ConnectTCP transport=call side=outer "
    "listen=::1 srcports=1-9 dstports=11-19 srchosts=any "
    "on-expire=drain expire=1893456000",
    "version=1 service=qubes.ForwardTCP transport=mux side=outer "
    "listen=0.0.0.0,:: srcports=22-22 dstports=22-22 "
    "srchosts=10.0.0.0/8,fd00::/8 proxy=v2",
)


@pytest.mark.parametrize("value", CONFIG_0_1)
def test_a_listener_reads_what_an_older_dom0_wrote(value: str) -> None:
    assert str(ListenerConfig.parse(KEY, value)) == value


def test_an_older_listener_reads_what_dom0_writes_for_a_rule_without_new_options() -> None:
    rule = ForwardRule.parse("action=forward srcports=80 dstports=8080 srchosts=192.168.0.0/16")
    lan = Sources.parse("192.168.0.0/16")
    told = ListenerConfig.of_rule(
        QubeName("work"), RuleName("web"), rule, lan, Service.FORWARD_TCP, Transport.MUX, Side.OUTER
    )
    assert str(told) == CONFIG_0_1[0]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (f"{CONFIG_0_1[0]} mark=7", "option 'mark' at column 134: unknown option"),
        (CONFIG_0_1[0].replace("version=1", "version=2"), "'version=2', written for another version"),
        (CONFIG_0_1[0].replace("mux", "quic"), "'quic' is not one of auto, mux, call"),
    ],
)
def test_what_a_newer_dom0_means_by_a_new_word_is_never_guessed(value: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ListenerConfig.parse(KEY, value)
    assert words in str(caught.value)


# Of the release that added UDP.
UDP_KEY, UDP_CONFIG = "udp.work.dns", CONFIG_0_1[2].replace("ForwardTCP", "ForwardUDP")


def test_udp_is_told_under_a_key_of_its_own_which_an_older_listener_does_not_read() -> None:
    assert str(ListenerConfig.parse(UDP_KEY, UDP_CONFIG)) == UDP_CONFIG
    assert not UDP_KEY.startswith("fwd.")
    with pytest.raises(ConfigError, match=r"qubes\.ForwardUDP does not carry tcp"):
        ListenerConfig.parse(KEY, UDP_CONFIG)


# dom0 to the target

ALLOWANCE_0_1 = b"version=1 drains=cut\nkeep 8080-8080 sys-net\nkeep 1-9 work\ndrain 9000-9000 sys-net 3600\n"
REVOKED_0_1 = b"version=1 ended=3 draining=1\n"


def test_what_dom0_allows_is_said_and_understood_as_it_was() -> None:
    told = allowance.Allowance.parse(ALLOWANCE_0_1)
    assert {str(calls) for calls in told.keeps} == {"8080-8080 sys-net", "1-9 work"}
    assert [(str(calls), seconds) for calls, seconds in told.drains.items()] == [("9000-9000 sys-net", 3600)]
    assert told.cuts_drains
    assert str(told).encode() == ALLOWANCE_0_1
    assert allowance.Revoked.parse(REVOKED_0_1) == allowance.Revoked(3, 1)
    assert f"{allowance.Revoked(3, 1)}\n".encode() == REVOKED_0_1


def test_what_dom0_allows_of_udp_is_said_and_understood_as_it_was() -> None:
    told = b"version=1 drains=keep\nkeep 53-53 sys-net\nkeep udp 53-53 sys-net\ndrain udp 9000-9009 work 60\n"
    assert str(allowance.Allowance.parse(told)).encode() == told


@pytest.mark.parametrize(
    "newer",
    [
        ALLOWANCE_0_1.replace(b"version=1", b"version=2"),
        ALLOWANCE_0_1.replace(b"drains=cut", b"drains=later"),
        ALLOWANCE_0_1.replace(b"keep", b"slow"),
    ],
)
def test_a_target_ends_nothing_by_a_list_that_is_newer_than_it(newer: bytes) -> None:
    with pytest.raises(TextError):
        allowance.Allowance.parse(newer)
    done = subprocess.run(
        [sys.executable, "-m", "qubes_fwd_qrexec.target.revocation"],
        input=newer,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (ExitStatus.BAD_ARGUMENT, b"")
    assert done.stderr.startswith(b"qubes.ForwardRevoke: ")


# The exposed qube to the target

CALL_0_1 = {
    "80": (TargetPorts(80, 80), False),
    "80+mux": (TargetPorts(80, 80), True),
    "80-90+mux": (TargetPorts(80, 90), True),
}


@pytest.mark.parametrize(("argument", "meaning"), CALL_0_1.items())
def test_a_call_is_understood_as_it_was(argument: str, meaning: tuple[TargetPorts, bool]) -> None:
    assert localserver.parse_argument(argument) == meaning


@pytest.mark.parametrize("argument", ["80+mux2", "80+mux+v2", "80+udp", "80-90"])
def test_a_target_refuses_a_call_that_is_newer_than_it(argument: str) -> None:
    with pytest.raises(ServiceError) as caught:
        localserver.parse_argument(argument)
    assert caught.value.status is ExitStatus.BAD_ARGUMENT


def test_a_mux_call_begins_as_it_did() -> None:
    for latest in (1, 2):
        begin = f"01000028 00000000 716677642d6d7578 0001 {latest:04} 00100000"
        listener = bytes.fromhex(begin + "00000000 00000000" + "6e" * 16)
        target = bytes.fromhex(begin + "00000064 0000012c" + "6e" * 16)
        assert wire.encode_hello(Hello(1 << 20, b"n" * 16, max_version=latest)) == listener
        assert wire.encode_hello(Hello(1 << 20, b"n" * 16, 100, 300, 1, latest)) == target
        assert wire.decode_hello(target[8:]) == Hello(1 << 20, b"n" * 16, 100, 300, 1, latest)
    assert Hello(1 << 20, b"n" * 16).max_version == latest


# One end of another release, which speaks versions LOWEST to HIGHEST. A later one has more to say in HELLO.
_OTHER = """
import sys
from functools import partial
from qubes_fwd_qrexec import service
from qubes_fwd_qrexec.target import muxservice
from qubes_fwd_qrexec.mux import connection, wire

muxservice.Hello = partial(muxservice.Hello, min_version={lowest}, max_version={highest})

def encode_longer(hello):
    return wire.frame(wire.FrameType.HELLO, 0, encode(hello)[8:] + b"and more" * ({highest} > 2))

encode, wire.encode_hello = wire.encode_hello, encode_longer
sys.exit(service.main([sys.argv[3].partition("+")[2]]))
"""


def other_target(directory: Path, lowest: int, highest: int) -> tuple[str, ...]:
    """A stand-in for qrexec-client-vm with a target of another release."""
    script = directory / "other"
    script.write_text(_OTHER.format(lowest=lowest, highest=highest))
    return (sys.executable, str(script))


@pytest.mark.usefixtures("mux_call_home")
async def test_a_listener_works_with_a_newer_target(tmp_path: Path, server: socket.socket) -> None:
    port = free_port()
    configure(tmp_path / "config", port, port_of(server), transport="mux")
    async with running_listener(tmp_path / "config", other_target(tmp_path, 1, 3)):  # noqa: SIM117
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)


@pytest.mark.usefixtures("mux_call_home")
async def test_a_listener_tells_an_older_target_no_first_bytes(tmp_path: Path, server: socket.socket) -> None:
    port = free_port()
    configure(tmp_path / "config", port, port_of(server), transport="mux")
    async with running_listener(tmp_path / "config", other_target(tmp_path, 1, 1)):  # noqa: SIM117
        async with await connect(port) as near:
            await near.send_all(b"first")  # there is no call yet, and when there is, this has come
            async with await accept(server) as far:
                assert await far.receive_some(5) == b"first"
                await echo_once(near, far)


@pytest.mark.usefixtures("mux_call_home")
async def test_a_newer_listener_works_with_this_target(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    configure(tmp_path / "config", port, port_of(server), transport="mux")
    encode: Callable[[Hello], bytes] = wire.encode_hello

    def encode_newer(hello: Hello) -> bytes:
        newer = Hello(hello.window_bytes, hello.nonce, hello.max_streams, hello.lease_s, 1, 3)
        return wire.frame(wire.FrameType.HELLO, 0, encode(newer)[8:] + b"and more")

    monkeypatch.setattr(wire, "encode_hello", encode_newer)
    client = FakeClient(tmp_path, "serve")
    async with running_listener(tmp_path / "config", client.command):  # noqa: SIM117
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)


@pytest.mark.usefixtures("mux_call_home")
async def test_without_a_version_in_common_connections_are_reset_and_the_log_says_why(
    tmp_path: Path, server: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    configure(tmp_path / "config", port, port_of(server), transport="mux")
    async with running_listener(tmp_path / "config", other_target(tmp_path, 3, 3)):  # noqa: SIM117
        async with await connect(port) as near:
            assert await is_reset(near)
    assert any("speaks versions 3 to 3 of the mux protocol, this end 1 to 2" in m for m in caplog.messages)


# Exposed qube and target to dom0

REPORT_0_1 = (
    b'{"version":1,"program":"0.1.0","listener":{"version":1,"since":1,"forwards":[{"target":"work","name":"web",'
    b'"since":1,"connections":2,"total":3,"refused":{"stranger":4},"sent":5,"received":6,"transport":"mux",'
    b'"way":"open","mux_calls":1,"is_listening":true,"last_error":null,"last_error_at":null}],"problems":'
    b'[{"key":"fwd.work.ssh","text":"the port is in use"}],"left_out":0,"draining":[{"target":'
    b'"work","name":"old","connections":1,"left_s":60}],"bugs":2},"listener_problem":null,"calls":'
    b'[{"source":"sys-net","ports":"80-80","mux_calls":1,"singles":2,"draining":1,"drain_left_s":60}],'
    b'"bugs":1,"trial":{"answer":"through","reason":"",'
    b'"text":""},"firewall":{"ip":"open","ip6":"closed","waiting":["fwd.work.ssh"]}}\n'
)


def test_an_answer_is_said_and_understood_as_it_was() -> None:
    told = report.QubeReport.parse(REPORT_0_1)
    assert told.firewall == report.FirewallReport(
        report.Firewall.OPEN, report.Firewall.CLOSED, ("fwd.work.ssh",)
    )
    assert report.dump(told.as_json()) == REPORT_0_1


# Of the release that added UDP.
REPORT_UDP = (
    REPORT_0_1.replace(
        b'"last_error_at":null}],',
        b'"last_error_at":null,"proto":"udp","datagrams_sent":7,"datagrams_received":8,"dropped":{"full":9}}],',
    )
    .replace(b'"left_s":60}],', b'"left_s":60,"proto":"udp"}],')
    .replace(b'"drain_left_s":60}],', b'"drain_left_s":60,"proto":"udp"}],')
)


def test_an_answer_about_udp_is_said_and_understood_as_it_was() -> None:
    assert report.dump(report.QubeReport.parse(REPORT_UDP).as_json()) == REPORT_UDP
    assert REPORT_UDP.count(b'"proto":"udp"') == 3


# Of the release that tells who is connected.
REPORT_CLIENTS = REPORT_0_1.replace(
    b'"bugs":2}',
    b'"bugs":2,"clients":[{"target":"work","name":"web","proto":"tcp","address":"fe80::1%eth0","port":5000,'
    b'"since":1,"sent":5,"received":6,"idle_s":7,"is_draining":true}],"clients_left_out":8}',
)
CUT = b'{"version":1,"cut":3,"problem":null}\n'


def test_who_is_connected_and_cut_is_said_and_understood_as_it_was() -> None:
    assert report.dump(report.QubeReport.parse(REPORT_CLIENTS).as_json()) == REPORT_CLIENTS
    assert report.dump(clientreport.CutReport.parse(CUT).as_json()) == CUT
    older = report.QubeReport.parse(REPORT_0_1).listener
    assert older is not None
    assert older.clients is None


def test_unknown_keys_of_a_newer_qube_are_ignored_and_another_version_is_refused() -> None:
    more = REPORT_0_1.replace(b'"firewall":{', b'"mood":"fine","firewall":{"arp":"open",')
    assert report.QubeReport.parse(more) == report.QubeReport.parse(REPORT_0_1)
    with pytest.raises(report.ReportError, match="is of version 2, and this program reads 1"):
        report.QubeReport.parse(REPORT_0_1.replace(b'"version":1', b'"version":2', 1))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (b'"since":1,"forwards"', b'"begun":1,"forwards"', "listener: since is missing"),
        (b'"left_out":0', b'"left_over":0', "left_out is missing"),
        (b'"way":"open"', b'"way":"asleep"', "way must be one of idle, opening, open"),
        (b'"mux"', b'"quic"', "transport must be one of auto, mux, call"),
        (b'"through"', b'"half"', "answer must be one of through, refused"),
    ],
)
def test_an_answer_without_a_key_or_with_a_new_word_is_refused_as_a_whole(
    before: bytes, after: bytes, words: str
) -> None:
    """A key that an older qube lacks, a word that a newer one has: neither comes without another version."""
    with pytest.raises(report.ReportError) as caught:
        report.QubeReport.parse(REPORT_0_1.replace(before, after, 1))
    assert words in str(caught.value)


@pytest.mark.parametrize("argument", ["8080-8090", "all", "fwd.work.web+twice"])
def test_a_qube_tries_nothing_for_a_question_that_is_newer_than_it(argument: str, tmp_path: Path) -> None:
    with pytest.raises(TextError):
        statusservice.answer(argument, statusservice.Places(*[tmp_path / "none"] * 4))


# A person's files

RULE = ForwardRule.parse("action=forward srcports=80 dstports=8080 srchosts=any")
TEXT = (
    "action=forward mode=auto forwardtype=external proto=tcp srcports=80-80 dstports=8080-8080 srchosts=any"
)
OPTIONS = dict(word.split("=") for word in TEXT.split())
MARKS = {QubeName("sys-vpn"): True}
FORWARDS = [{"qube": "work", "name": "web", "rule": OPTIONS}]
PROPERTIES = "".join(f'<property name="{name}">{value}</property>' for name, value in OPTIONS.items())
QUBE = f'<qube name="work"><rule name="web"><properties>{PROPERTIES}</properties></rule></qube>'
PARSERS = {
    "text": exchange.parse_lines,
    "json": exchange.parse_json,
    "xml": rulexml.parse_document,
}
EXPORTS: dict[tuple[str, int], str] = {
    ("text", 1): f"work web {TEXT}\n",
    ("text", 2): f"version 2\nsys-vpn tunnel yes\nwork web {TEXT}\n",
    ("json", 1): json.dumps({"version": 1, "forwards": FORWARDS}),
    ("json", 2): json.dumps({"version": 2, "tunnels": {"sys-vpn": True}, "forwards": FORWARDS}),
    ("xml", 1): f'<forwards version="1">{QUBE}</forwards>',
    ("xml", 2): f'<forwards version="2"><tunnel qube="sys-vpn">yes</tunnel>{QUBE}</forwards>',
}


@pytest.mark.parametrize(("form", "version"), EXPORTS)
def test_an_export_of_this_version_and_the_one_before_is_read(form: str, version: int) -> None:
    found = PARSERS[form](EXPORTS[form, version])
    assert [(read.target, read.name, read.rule) for read in found.rules] == [("work", "web", RULE)]
    assert found.tunnels == (MARKS if version == 2 else {})
    assert found.is_export is (version == 2)


@pytest.mark.parametrize("form", PARSERS)
def test_an_export_of_a_later_version_is_refused_by_name(form: str) -> None:
    later = EXPORTS[form, 2].replace("version 2", "version 3").replace('version="2"', 'version="3"')
    with pytest.raises(RuleError, match="version"):
        PARSERS[form](later.replace('"version": 2', '"version": 3'))


def test_an_export_is_written_as_it_was() -> None:
    rules = [NamedRule(QubeName("work"), RuleName("web"), RULE)]
    assert exchange.print_lines(rules, MARKS) == EXPORTS["text", 2]
    assert exchange.as_json(rules, MARKS) == json.loads(EXPORTS["json", 2])
    written = "".join(line.strip() for line in rulexml.print_document(rules, MARKS).splitlines()[1:])
    assert written == EXPORTS["xml", 2]
