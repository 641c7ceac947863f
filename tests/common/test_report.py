# SPDX-License-Identifier: GPL-2.0-or-later
"""What a qube says of itself: it prints and parses, and a qube that lies is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from string import ascii_lowercase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rule_strategies import words

from qubes_fwd_qrexec.common import document, report
from qubes_fwd_qrexec.common.clientreport import CLIENTS_MAX, ClientReport, parse_client_address
from qubes_fwd_qrexec.common.report import (
    Answer,
    CallsReport,
    DrainingReport,
    Firewall,
    FirewallReport,
    ForwardReport,
    ListenerReport,
    Problem,
    QubeReport,
    ReportError,
    Trial,
    Way,
)
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.values import Proto, QubeName, RuleName, TargetPorts

numbers = st.integers(0, 2**63 - 1)
texts = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=report.TEXT_MAX)
qubes = st.sampled_from([QubeName("work"), QubeName("sys-net"), QubeName("a" * 31)])
forwards = st.builds(
    ForwardReport,
    target=qubes,
    name=st.sampled_from([RuleName("web"), RuleName("x")]),
    since=numbers,
    connections=numbers,
    total=numbers,
    refused=st.dictionaries(words(ascii_lowercase, f"{ascii_lowercase}-", 32), numbers, max_size=5),
    sent=numbers,
    received=numbers,
    transport=st.sampled_from(Transport),
    way=st.sampled_from(Way),
    mux_calls=numbers,
    is_listening=st.booleans(),
    last_error=st.none() | texts,
    last_error_at=st.none() | numbers,
)
counts = st.dictionaries(words(ascii_lowercase, f"{ascii_lowercase}-", 32), numbers, max_size=5)
forwards |= st.builds(
    replace,
    forwards,
    proto=st.just(Proto.UDP),
    datagrams_sent=numbers,
    datagrams_received=numbers,
    dropped=counts,
)
protos = st.sampled_from(Proto.BOTH.each)
listeners = st.builds(
    ListenerReport,
    since=numbers,
    forwards=st.lists(forwards, max_size=3).map(tuple),
    problems=st.lists(st.builds(Problem, texts, texts), max_size=3).map(tuple),
    left_out=numbers,
    draining=st.lists(
        st.builds(
            DrainingReport,
            target=qubes,
            name=st.just(RuleName("web")),
            connections=numbers,
            left_s=numbers,
            proto=protos,
        ),
        max_size=3,
    ).map(tuple),
)
trials = st.builds(Trial, st.sampled_from(Answer), texts, texts)
ports = st.builds(TargetPorts, st.integers(1, 99), st.integers(99, 65535))
firewalls = st.builds(
    FirewallReport,
    st.sampled_from(Firewall),
    st.sampled_from(Firewall),
    st.lists(texts, max_size=3).map(tuple),
)
answers = st.builds(
    QubeReport,
    program=texts,
    listener=st.none() | listeners,
    listener_problem=st.none() | texts,
    calls=st.lists(
        st.builds(
            CallsReport,
            source=qubes,
            ports=ports,
            mux_calls=numbers,
            singles=numbers,
            draining=numbers,
            drain_left_s=st.none() | numbers,
            proto=protos,
        ),
        max_size=3,
    ).map(tuple),
    trial=st.none() | trials,
    firewall=firewalls,
)


@given(answers)
def test_what_prints_parses(answer: QubeReport) -> None:
    assert QubeReport.parse(report.dump(answer.as_json())) == answer


@given(listeners, trials)
def test_what_a_listener_prints_parses(listener: ListenerReport, trial: Trial) -> None:
    assert ListenerReport.parse(report.dump(listener.as_json())) == listener
    assert Trial.parse(report.dump(trial.as_json())) == trial


@given(firewalls)
def test_what_is_said_of_the_firewall_prints_and_parses(firewall: FirewallReport) -> None:
    assert FirewallReport.parse(report.dump(firewall.as_json())) == firewall


@given(st.binary(max_size=200) | st.text(max_size=50).map(lambda text: json.dumps(text).encode()))
def test_any_bytes_are_a_report_or_an_error_of_ours(untrusted: bytes) -> None:
    for parse in (QubeReport.parse, ListenerReport.parse, FirewallReport.parse, Trial.parse):
        with pytest.raises(ReportError) as caught:
            parse(untrusted)
        assert str(caught.value).isprintable()
        assert str(caught.value).isascii()


FORWARD = ForwardReport(
    target=QubeName("work"),
    name=RuleName("web"),
    since=1,
    connections=2,
    total=3,
    refused={"source": 4},
    sent=5,
    received=6,
    transport=Transport.MUX,
    way=Way.OPEN,
    mux_calls=1,
    is_listening=True,
)
UDP = replace(
    FORWARD, proto=Proto.UDP, datagrams_sent=7, datagrams_received=8, dropped={"full": 9, "too-long": 1}
)
WHOLE = QubeReport(
    program="1",
    listener=ListenerReport(since=1, forwards=(FORWARD, UDP), problems=(Problem("a", "b"),)),
    calls=(CallsReport(source=QubeName("a"), ports=TargetPorts(1, 2), mux_calls=3),),
    trial=Trial(Answer.THROUGH, "", ""),
)
Change = Callable[[Any], object]


def put(value: object, *path: str | int) -> Change:
    def change(data: Any) -> None:
        *way, last = path
        for step in way:
            data = data[step]
        data[last] = value

    return change


F = ("listener", "forwards", 0)
U = ("listener", "forwards", 1)
LIES = [
    (put("both", *U, "proto"), "proto must be tcp or udp"),
    (put("sctp", *U, "proto"), "proto must be tcp or udp"),
    (put(None, *U, "proto"), "proto must be printable ASCII"),
    (put(-1, *U, "datagrams_sent"), "datagrams_sent must be a whole number"),
    (put("8", *U, "datagrams_received"), "datagrams_received must be a whole number"),
    (put([], *U, "dropped"), "dropped must be an object"),
    (put({"Full": 1}, *U, "dropped"), "dropped must be at most 32 words"),
    (put("quic", "calls", 0, "proto"), "proto must be tcp or udp"),
    (put(2, "version"), "is of version 2, and this program reads 1"),
    (put(True, "version"), "version must be a whole number"),
    (put(1.0, "version"), "version must be a whole number"),
    (put(2, "listener", "version"), "listener is of version 2"),
    (put("a\x1b[2J", "program"), "program must be printable ASCII"),
    (put("x\n", "program"), "program must be printable ASCII"),
    (put("\u202e", "program"), "program must be printable ASCII"),
    (put("x" * 201, "program"), "at most 200 characters"),
    (put(-1, *F, "sent"), "sent must be a whole number"),
    (put(2**63, *F, "sent"), "sent must be a whole number"),
    (put("1", *F, "total"), "total must be a whole number"),
    (put(None, *F, "total"), "total must be a whole number"),
    (put("../x", *F, "target"), "target must be a qube's name"),
    (put("WEB", *F, "name"), "name must be a rule's name"),
    (put("splendid", *F, "way"), "way must be one of idle, "),
    (put(1, *F, "is_listening"), "is_listening must be true or false"),
    (put({"\x1b": 1}, *F, "refused"), "refused must be at most 32 words"),
    (put({"a" * 33: 1}, *F, "refused"), "refused must be at most 32 words"),
    (put({f"{'a' * n}": 1 for n in range(1, 34)}, *F, "refused"), "refused must be at most 32 words"),
    (put({"source": "x"}, *F, "refused"), "source must be a whole number"),
    (put([], *F, "refused"), "refused must be an object"),
    (put({}, "listener", "forwards"), "forwards must be a list"),
    (put([{}] * 1001, "listener", "forwards"), "a list of at most 1000"),
    (put([{}] * 101, "listener", "problems"), "a list of at most 100"),
    (put([{}] * 1001, "calls"), "a list of at most 1000"),
    (put([{}], "calls"), "source is missing"),
    (put("0-1", "calls", 0, "ports"), "ports must be a port or range"),
    (put("maybe", "trial", "answer"), "answer must be one of through, "),
    (put("open", "firewall"), "firewall must be an object"),
    (put("ajar", "firewall", "ip"), "ip must be one of open, closed, unknown"),
    (put(None, "firewall", "ip6"), "ip6 must be printable ASCII"),
    (put("fwd.a.b", "firewall", "waiting"), "waiting must be a list of at most 1000"),
    (put([""] * 1001, "firewall", "waiting"), "waiting must be a list of at most 1000"),
    (put(["\x1b"], "firewall", "waiting"), "waiting must be printable ASCII"),
    (put([["a"]], "firewall", "waiting"), "waiting must be printable ASCII"),
    (put("x", "listener"), "listener must be an object"),
]


def test_what_is_said_of_tcp_is_what_it_was_and_udp_says_more() -> None:
    tcp, udp = FORWARD.as_json(), UDP.as_json()
    more = {"proto": "udp", "datagrams_sent": 7, "datagrams_received": 8, "dropped": UDP.dropped}
    assert udp == tcp | more
    assert not tcp.keys() & more.keys()
    listener = WHOLE.listener
    assert listener is not None
    assert listener.find("work", "web") == FORWARD
    assert listener.find("work", "web", Proto.UDP) == UDP
    assert listener.find("work", "dns", Proto.UDP) is None


@pytest.mark.parametrize(("lie", "words"), LIES, ids=lambda value: value if isinstance(value, str) else "")
def test_each_lie_is_refused_and_named(lie: Change, words: str) -> None:
    data = WHOLE.as_json()
    data = json.loads(json.dumps(data))
    assert QubeReport.parse(json.dumps(data).encode()) == WHOLE
    lie(data)
    with pytest.raises(ReportError, match=words):
        QubeReport.parse(json.dumps(data).encode())


@pytest.mark.parametrize(
    "untrusted",
    [
        b"[" * 100_000,
        b'{"version":' + b"9" * 10_000 + b"}",
        b'{"version":NaN}',
        b"\xff",
        b"",
        b" " * (report.REPORT_MAX_BYTES + 1),
    ],
    ids=["deep", "digits", "nan", "latin", "empty", "long"],
)
def test_what_would_hurt_to_read_is_refused(untrusted: bytes) -> None:
    with pytest.raises(ReportError):
        QubeReport.parse(untrusted)


def test_a_key_that_is_there_twice_is_refused() -> None:
    text = report.dump(WHOLE.as_json())
    assert QubeReport.parse(text) == WHOLE
    with pytest.raises(ReportError):
        QubeReport.parse(text.replace(b'"mux_calls":1', b'"mux_calls":1,"mux_calls":1'))


def test_what_a_newer_qube_adds_is_passed_over() -> None:
    data = WHOLE.as_json() | {"new": [1]}
    data["listener"]["new"] = {}
    assert QubeReport.parse(json.dumps(data).encode()) == WHOLE


def test_a_forward_is_found_by_its_target_and_name() -> None:
    other = replace(FORWARD, name=RuleName("ssh"))
    listener = ListenerReport(since=1, forwards=(FORWARD, other))
    assert listener.find("work", "ssh") is other
    assert listener.find("home", "ssh") is None


def test_calls_that_nobody_counts_are_none() -> None:
    said = CallsReport(source=QubeName("a"), ports=TargetPorts(1, 2)).as_json()
    nothing = {"mux_calls": 0, "singles": 0, "draining": 0, "drain_left_s": None}
    assert said == {"source": "a", "ports": "1-2"} | nothing


def test_the_largest_report_fits() -> None:
    longest = {
        "target": QubeName("a" * 31),
        "name": RuleName("a" * 16),
        "refused": {chr(97 + n) * 32: 2**63 - 1 for n in range(document.REASONS_MAX // 2)},
        "last_error": '"' * report.TEXT_MAX,
    }
    whole = FORWARD.as_json() | longest | dict.fromkeys(("since", "sent", "received", "total"), 2**63 - 1)
    forwards = len(report.dump(whole)) * report.FORWARDS_MAX
    client = ClientReport(
        target=QubeName("a" * 31),
        name=RuleName("a" * 16),
        proto=Proto.UDP,
        address=parse_client_address(f"fe80:{':'.join(['1111'] * 7)}%{'a' * 15}"),
        port=65535,
        since=2**63 - 1,
        sent=2**63 - 1,
        received=2**63 - 1,
        idle_s=2**63 - 1,
    )
    clients = len(report.dump(client.as_json())) * CLIENTS_MAX
    assert forwards + clients < report.REPORT_MAX_BYTES
