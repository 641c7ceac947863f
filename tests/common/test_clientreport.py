# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is connected, and whom to cut: it prints and parses, and a qube that lies is refused."""

import json
from dataclasses import replace
from ipaddress import IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_fwd_qrexec.common import clientreport, report
from qubes_fwd_qrexec.common.clientreport import ClientReport, CutReport, WhichClients
from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.common.report import ListenerReport, ReportError
from qubes_fwd_qrexec.common.values import IPAddress, Proto, QubeName, RuleName, address_text

ports = st.integers(1, 65535)
zoned = st.builds(
    lambda host, zone: IPv6Address(f"{IPv6Address(0xFE80 << 112 | host)}%{zone}"),
    st.integers(0, 2**64 - 1),
    st.sampled_from(["eth0", "vif1.0", "wlan_0-a", "3", "a" * 15]),
)
addresses = (st.ip_addresses() | zoned).filter(lambda each: each.version == 4 or not each.ipv4_mapped)
CLIENT = ClientReport(
    target=QubeName("work"),
    name=RuleName("web"),
    proto=Proto.TCP,
    address=ip_address("192.0.2.1"),
    port=5000,
    since=1,
    sent=2,
    received=3,
    idle_s=4,
)


def listener(*clients: ClientReport) -> ListenerReport:
    return ListenerReport(since=1, forwards=(), clients=clients, clients_left_out=7)


@given(addresses, ports, st.sampled_from(Proto.BOTH.each), st.booleans())
def test_clients_print_and_parse(address: IPAddress, port: int, proto: Proto, ends: bool) -> None:
    told = listener(CLIENT, replace(CLIENT, address=address, port=port, proto=proto, is_draining=ends))
    assert ListenerReport.parse(report.dump(told.as_json())) == told


@given(st.builds(WhichClients, addresses, st.none() | ports) | st.just(WhichClients()))
def test_which_clients_prints_and_parses(which: WhichClients) -> None:
    assert WhichClients.parse(str(which)) == which
    assert len(f"{which}\n") <= clientreport.WHICH_MAX_BYTES


def test_nothing_is_said_of_clients_unless_asked() -> None:
    told = ListenerReport(since=1, forwards=())
    assert not {"clients", "clients_left_out"} & told.as_json().keys()
    assert ListenerReport.parse(report.dump(told.as_json())).clients is None
    assert ListenerReport.parse(report.dump(listener().as_json())).clients == ()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("address", "192.0.2.1\x1b", "address must be printable ASCII"),
        ("address", "home", "address must be an IPv4 or IPv6 address"),
        ("address", "::ffff:192.0.2.1", "address must be an address without zone, and not IPv4 written"),
        ("address", "192.0.2.1%eth0", "address must be .* zone only if it is link-local"),
        ("address", "2001:db8::1%eth0", "address must be .* zone only if it is link-local"),
        ("address", "fe80::1%a/b", "address must be .* zone only if it is link-local"),
        ("address", f"fe80::1%{'a' * 16}", "address must be .* zone only if it is link-local"),
        ("address", "fe80::1%", "address must be .* zone only if it is link-local"),
        ("address", 1, "address must be printable ASCII"),
        ("port", 0, "port must be a port from 1 to 65535"),
        ("port", 65536, "port must be a port from 1 to 65535"),
        ("port", "80", "port must be a whole number"),
        ("target", "../x", "target must be a qube's name"),
        ("name", "WEB", "name must be a rule's name"),
        ("proto", "both", "proto must be tcp or udp"),
        ("since", -1, "since must be a whole number"),
        ("sent", None, "sent must be a whole number"),
        ("received", 1.5, "received must be a whole number"),
        ("idle_s", 2**63, "idle_s must be a whole number"),
        ("is_draining", 1, "is_draining must be true or false"),
    ],
)
def test_each_lie_is_refused_and_named(key: str, value: object, words: str) -> None:
    data = json.loads(report.dump(listener(CLIENT).as_json()))
    data["clients"][0][key] = value
    with pytest.raises(ReportError, match=words):
        ListenerReport.parse(json.dumps(data).encode())


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("fe80::1%a b", "fe80::1"),
        ("2001:db8::1%eth0", "2001:db8::1"),
        ("2001:db8::1", "2001:db8::1"),
    ],
)
def test_an_interface_of_any_name_makes_no_answer_unreadable(address: str, said: str) -> None:
    assert str(clientreport.sayable(ip_address(address))) == said
    told = listener(replace(CLIENT, address=clientreport.sayable(ip_address(address))))
    assert ListenerReport.parse(report.dump(told.as_json())) == told


def test_too_many_clients_are_refused() -> None:
    told = listener(*[CLIENT] * clientreport.CLIENTS_MAX)
    assert ListenerReport.parse(report.dump(told.as_json())) == told
    more = report.dump(listener(*[CLIENT] * (clientreport.CLIENTS_MAX + 1)).as_json())
    with pytest.raises(ReportError, match="clients must be a list of at most 2000"):
        ListenerReport.parse(more)


@pytest.mark.parametrize(
    "text",
    [
        *(":80", "[]:80", "192.0.2.1:", "192.0.2.1:0", "192.0.2.1:65536", "192.0.2.1:+1", "[2001:db8::1]"),
        *("[2001:db8::1]:x", "[192.0.2.1]:5000:1", "home", "home:80", " ", "192.0.2.1\n", "192.0.2.0/24"),
        *("::ffff:192.0.2.1", "[2001:db8::1%eth0]:80"),
    ],
)
def test_what_is_no_client_is_refused(text: str) -> None:
    with pytest.raises(TextError):
        WhichClients.parse(text)


def test_a_port_alone_names_nobody() -> None:
    with pytest.raises(TextError, match="a port with its address"):
        WhichClients(None, 80)


@pytest.mark.parametrize(
    ("which", "yes", "no"),
    [
        ("", ["192.0.2.1:1", "[fe80::1%eth0]:2"], []),
        ("192.0.2.1", ["192.0.2.1:1", "192.0.2.1:2"], ["192.0.2.2:1"]),
        ("192.0.2.1:1", ["192.0.2.1:1"], ["192.0.2.1:2", "192.0.2.2:1"]),
        ("2001:db8::1", ["[2001:db8::1]:1"], ["[2001:db8::2]:1"]),
        ("[2001:db8::1]:1", ["[2001:db8::1]:1"], ["[2001:db8::1]:2"]),
        ("fe80::1", ["[fe80::1]:1", "[fe80::1%eth0]:1", "[fe80::1%eth1]:1"], ["[fe80::2%eth0]:1"]),
        ("fe80::1%eth0", ["[fe80::1%eth0]:1"], ["[fe80::1]:1", "[fe80::1%eth1]:1"]),
    ],
)
def test_it_says_which_clients_are_meant(which: str, yes: list[str], no: list[str]) -> None:
    meant = WhichClients.parse(which)
    for text, is_meant in [*((each, True) for each in yes), *((each, False) for each in no)]:
        client = WhichClients.parse(text)
        assert client.address is not None
        assert client.port is not None
        assert meant.has(client.address, client.port) is is_meant, text
        assert address_text(client.address, client.port) == text


def test_what_was_cut_prints_and_parses() -> None:
    assert CutReport.parse(report.dump(CutReport(3).as_json())) == CutReport(3)


@pytest.mark.parametrize(
    "said", [b"", b"3", b'{"version":2,"cut":3}', b'{"version":1}', b'{"version":1,"cut":-1}']
)
def test_any_other_answer_to_a_cut_is_refused(said: bytes) -> None:
    with pytest.raises(ReportError):
        CutReport.parse(said)
