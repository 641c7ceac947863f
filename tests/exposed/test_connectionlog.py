# SPDX-License-Identifier: GPL-2.0-or-later
"""The log of connections: what each line has, and how many there are at most."""

import logging
import re
from ipaddress import IPv6Address

import pytest
from helpers import tcp_pair

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.exposed.connectionlog import BURST, LINES_PER_S, ConnectionLog, FlowHow
from qubes_fwd_qrexec.exposed.counters import Carried
from qubes_fwd_qrexec.system.logs import LINE_MAX, one_line

CONFIG = ListenerConfig.parse(
    "fwd.work.web",
    "version=1 service=qubes.ForwardTCP transport=mux side=outer "
    "listen=0.0.0.0 srcports=80-80 dstports=8080-8080 "
    "srchosts=any",
)


class Moved:
    sent, received, moved_at, is_joined = 10, 20, 0.0, True


def test_one_line_at_the_beginning_and_one_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log, carried = ConnectionLog(), Carried(0.0)
    carried.by = Moved()
    client, accepted = tcp_pair()
    with client, accepted:
        host, port = client.getsockname()
        line = log.opened(CONFIG, accepted.getpeername, 80)
    log.ended(line, CONFIG, carried, "closed")
    first, last = (dict(word.split("=") for word in message.split()) for message in caplog.messages)
    both = {"client": f"{host}:{port}", "port": "80", "transport": "mux", "forward": "work.web"}
    assert first == both | {"connection": "open"}
    assert float(last.pop("seconds")) > 0
    assert last == both | {"connection": "end", "how": "closed", "sent": "10", "received": "20"}


UDP = ListenerConfig.parse(
    "udp.work.dns",
    "version=1 service=qubes.ForwardUDP transport=mux side=outer "
    "listen=0.0.0.0 srcports=53-53 dstports=53-53 "
    "srchosts=any",
)


@pytest.mark.parametrize("config", [CONFIG, UDP])
def test_the_journal_has_each_value_in_a_field_of_its_own(
    config: ListenerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log, carried = ConnectionLog(), Carried(0.0)
    carried.by = Moved()
    opened = log.opened(config, lambda: ("fe80::1%eth0", 4000, 0, 2), 80)
    log.ended(opened, config, carried, FlowHow.IDLE)
    first, last = (record.fields for record in caplog.records)  # type: ignore[attr-defined]
    both = {
        "FORWARD": f"{config.target}.{config.name}",
        "FORWARD_PROTO": str(config.proto),
        "FORWARD_PORT": "80",
        "FORWARD_CLIENT": "fe80::1%eth0",
        "FORWARD_CLIENT_PORT": "4000",
    }
    assert first == both | {"FORWARD_EVENT": "open"}
    assert float(last.pop("FORWARD_SECONDS")) > 0
    at_end = {"FORWARD_HOW": "idle", "FORWARD_SENT": "10", "FORWARD_RECEIVED": "20"}
    assert last == both | {"FORWARD_EVENT": "end"} | at_end
    for name in first | last:
        assert re.fullmatch("[A-Z][A-Z0-9_]{0,63}", name)  # journald drops any other


class Longest:
    """The longest names that there can be."""

    target, name, transport, proto = "a" * 31, "b" * 16, "call", Proto.TCP


class FarClient:
    def getpeername(self) -> tuple[str, int]:
        return str(IPv6Address(2**128 - 2)), 65535


def test_the_longest_line_has_everything_but_the_end_of_a_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log, carried = ConnectionLog(), Carried(-1e6)
    carried.by = type("Much", (), {"sent": 10**13, "received": 10**13, "is_joined": True})()
    line = log.opened(Longest, FarClient().getpeername, 65535)  # type: ignore[arg-type]
    log.ended(line, Longest, carried, "target-reset")  # type: ignore[arg-type]
    for message in caplog.messages:
        assert "forward=" in one_line(f"info: {message}")[:LINE_MAX]


def test_a_client_that_is_gone_is_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client, accepted = tcp_pair()
    client.close()
    accepted.close()
    ConnectionLog().opened(CONFIG, accepted.getpeername, 80)
    assert "client=gone port=80 " in caplog.messages[0]
    fields = caplog.records[0].fields  # type: ignore[attr-defined]
    assert fields["FORWARD_CLIENT"] == "gone"
    assert "FORWARD_CLIENT_PORT" not in fields


def test_a_flood_is_held_back_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    log = ConnectionLog(lambda: now[0])
    client, accepted = tcp_pair()
    with client, accepted:
        lines = [log.opened(CONFIG, accepted.getpeername, 80) for _ in range(BURST + 50)]
        assert [line is None for line in lines] == [False] * BURST + [True] * 50
        log.ended(lines[0], CONFIG, Carried(0.0), "closed")
        log.ended(None, CONFIG, Carried(0.0), "closed")
        assert len(caplog.messages) == BURST
        now[0] = 1 / LINES_PER_S
        log.opened(CONFIG, accepted.getpeername, 80)
        assert caplog.messages[-1].endswith(" held_back=51")
        assert log.opened(CONFIG, accepted.getpeername, 80) is None
        now[0] = 1e6  # a long silence saves up no more than a burst
        assert [log.opened(CONFIG, accepted.getpeername, 80) is None for _ in range(BURST + 1)] == [
            False
        ] * BURST + [True]
