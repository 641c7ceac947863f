# SPDX-License-Identifier: GPL-2.0-or-later
"""Small values: what parses prints, and what is almost right is refused."""

from contextlib import suppress
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from qubes_fwd_qrexec.common import values
from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.common.values import ListenPorts, PortRange, Sources, TargetPorts

# docs/behaviours.md, 43 and its kin: what int(), isdigit() and "$" would let through.
BAD_PORTS = [
    "+8080",
    " 8080",
    "8080 ",
    "08080",
    "8_080",
    "8080\n",
    "\u0668\u0660\u0668\u0660",
    "8\u00b2",
    "0",
    "65536",
    "100000",
    "-1",
    "",
    "0x50",
    "80.0",
    "http",
    "8080\x00",
]


@pytest.mark.parametrize("text", BAD_PORTS)
def test_a_port_is_plain_digits_from_1_to_65535(text: str) -> None:
    with pytest.raises(TextError) as error:
        values.parse_port(text)
    assert str(error.value) == f"{text!a} is not a port: a number from 1 to 65535"
    with pytest.raises(TextError, match="N or N-M"):
        ListenPorts.parse(text)
    with pytest.raises(TextError, match="N or N-M"):
        ListenPorts.parse(f"1-{text}")


@given(st.integers(1, 65535))
def test_ports_print_as_they_parse(port: int) -> None:
    assert values.parse_port(str(port)) == port


@given(st.integers(1, 65535), st.integers(1, 65535))
def test_port_ranges_print_as_they_parse(one: int, other: int) -> None:
    ports = PortRange(min(one, other), max(one, other))
    assert PortRange.parse(str(ports)) == PortRange.parse(ports.brief()) == ports
    assert len(ports) == abs(one - other) + 1
    assert ports.first in ports
    assert ports.last in ports
    assert ports.last + 1 not in ports
    assert "80" not in ports


def test_one_port_is_said_to_be_one_and_a_range_to_be_more() -> None:
    assert PortRange(80, 80).worded() == "port 80"
    assert PortRange(80, 81).worded() == "ports 80-81"


def test_a_range_begins_with_the_smaller() -> None:
    with pytest.raises(TextError, match="the smaller first"):
        ListenPorts.parse("90-80")
    with pytest.raises(TextError, match="the smaller first"):
        PortRange(90, 80)


def test_a_range_lists_its_ports_and_knows_its_role() -> None:
    assert list(TargetPorts.parse("80-82")) == [80, 81, 82]
    assert ListenPorts(80, 80) != TargetPorts(80, 80)


@given(*[st.integers(1, 40)] * 4)
@example(1, 2, 2, 3)
@example(2, 3, 1, 2)
def test_ranges_overlap_if_they_share_a_port(a: int, b: int, c: int, d: int) -> None:
    one, other = PortRange(min(a, b), max(a, b)), PortRange(min(c, d), max(c, d))
    assert one.overlaps(other) == bool(set(one) & set(other))


@pytest.mark.parametrize("text", ["work", "a", "A1_.-", "x" * 31])
def test_names_of_qubes(text: str) -> None:
    assert values.parse_qube_name(text) == text


@pytest.mark.parametrize(
    "text", ["", "1work", "wo rk", "work\n", "x" * 32, "@anyvm", "w\u00f6rk", "a/b", "sys,net"]
)
def test_what_is_no_name_of_a_qube(text: str) -> None:
    with pytest.raises(TextError, match="a qube's name: a letter, then at most 30"):
        values.parse_qube_name(text)


@pytest.mark.parametrize("text", ["", "Web", "1web", "we.b", "web\n", "x" * 17, "we_b"])
def test_what_is_no_name_of_a_rule(text: str) -> None:
    with pytest.raises(TextError, match="a small letter, then at most 15"):
        values.parse_rule_name(text)


@pytest.mark.parametrize("text", ["-1", "01", "1 ", "", "x", "1" * 20, "\u0661"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(TextError, match="a whole number"):
        values.parse_number(text)


def test_numbers_and_words() -> None:
    assert values.parse_number("0") == 0
    assert values.parse_number("1893456000") == 1893456000


@pytest.mark.parametrize("text", ["253402300800", "9223372036854775808", "+8h", "-1", ""])
def test_no_time_is_later_than_what_can_be_shown(text: str) -> None:
    assert values.parse_time("253402300799") == values.TIME_MAX
    with pytest.raises(TextError):
        values.parse_time(text)


def test_yes_and_no_have_the_words_of_qubes_own_tools() -> None:
    assert [values.parse_yes_no(values.yes_no(value)) for value in (True, False)] == [True, False]
    assert all(values.parse_yes_no(text) for text in ("yes", "on", "true", "1", "True"))
    assert not any(values.parse_yes_no(text) for text in ("no", "off", "false", "0", "NO"))
    for text in ("", "2", "y", "yes ", "none"):
        with pytest.raises(TextError, match="yes or no"):
            values.parse_yes_no(text)


NOBODY = ["0.0.0.0", "0.0.0.0/8", "0.1.2.3", "224.0.0.251", "224.0.0.0/4", "255.255.255.255", "::", "ff02::1"]
EVERYBODY = [
    "0.0.0.0/0",
    "::/0",
    "0.0.0.0/1,128.0.0.0/1",
    "10.0.0.0/8,::/0",
    "2000::/3",
    "2000::/4,3000::/4,fd00::/8",
    # All of the Internet, and no private network.
    "0.0.0.0/5,8.0.0.0/7,11.0.0.0/8,12.0.0.0/6,16.0.0.0/4,32.0.0.0/3,64.0.0.0/2,128.0.0.0/3,160.0.0.0/5,"
    "168.0.0.0/6,172.0.0.0/12,172.32.0.0/11,172.64.0.0/10,172.128.0.0/9,173.0.0.0/8,174.0.0.0/7,176.0.0.0/4,"
    "192.0.0.0/9,192.128.0.0/11,192.160.0.0/13,192.169.0.0/16,192.170.0.0/15,192.172.0.0/14,192.176.0.0/12,"
    "192.192.0.0/10,193.0.0.0/8,194.0.0.0/7,196.0.0.0/6,200.0.0.0/5,208.0.0.0/4",
]


@pytest.mark.parametrize("text", EVERYBODY)
def test_everybody_is_said_by_its_word(text: str) -> None:
    family, listen = ("IPv6", "::") if "::" in text else ("IPv4", r"0\.0\.0\.0")
    words = (
        rf"lets in everybody by {family}, which is said by the word any \(and listen={listen} for {family}"
    )
    with pytest.raises(TextError, match=words):
        Sources.parse(text)


@pytest.mark.parametrize(
    "text", ["0.0.0.0/1", "128.0.0.0/1", "2000::/4", "10.0.0.0/8,172.16.0.0/12,fc00::/7"]
)
def test_many_are_not_everybody(text: str) -> None:
    assert str(Sources.parse(text)) == text


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        ("any", "any"),
        ("any", "10.0.0.0/8,fd00::/8"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.0.0.0/9,10.128.0.0/9", "10.0.0.0/8"),
        ("10.0.0.0/8,fd00::/8", "10.1.2.3/32"),
    ],
)
def test_sources_cover_what_is_within_them_and_no_more(wide: str, narrow: str) -> None:
    some, others = Sources.parse(wide), Sources.parse(narrow)
    assert some.cover(others)
    assert others.cover(some) == (
        set(wide.split(",")) == set(narrow.split(",")) or wide.startswith("10.0.0.0/9")
    )


@pytest.mark.parametrize("text", ["a\n", "\t", "\x7f", "\u00e9", "\x1b"])
def test_only_printable_ascii_fits_into_a_feature(text: str) -> None:
    with pytest.raises(TextError, match="all that a Qubes feature can hold"):
        values.parse_printable(text)


@pytest.mark.parametrize(
    "text", ["fe80::1%eth0", "::ffff:10.0.0.1", "10.0.0.0/8", "", "localhost", "010.0.0.1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(TextError, match="address"):
        values.parse_address(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10.0.0.1/8", "bits of the host are set; 10.0.0.0/8 would be right"),
        ("10.0.0.0/33", "a network such as 192.168.0.0/16 or fd00::/8"),
        ("lan", "a network such as"),
        ("", "a network such as"),
        ("::ffff:10.0.0.0/104", "IPv4 as IPv4"),
        ("fe80::1%eth0", "without zone"),
        *((text, "no client has such an address") for text in NOBODY),
    ],
)
def test_what_is_no_network(text: str, words: str) -> None:
    with pytest.raises(TextError, match=words.replace(".", r"\.")):
        values.parse_network(text)


def test_any_stands_alone() -> None:
    with pytest.raises(
        TextError, match=r"'any,10\.0\.0\.0/8' is not a list of networks: any lets in everybody"
    ):
        Sources.parse("any,10.0.0.0/8")


def is_of_clients(network: values.IPNetwork) -> bool:
    with suppress(TextError):
        return values.parse_network(str(network)) == network
    return False


networks = st.builds(
    lambda address, bits: (
        ip_network((int(address), bits % (address.max_prefixlen + 1)), strict=False)
        if address.version == 4
        else ip_network((address, bits % (address.max_prefixlen + 1)), strict=False)
    ),
    st.ip_addresses(),
    st.integers(0, 128),
).filter(is_of_clients)


@settings(deadline=None)
@given(st.lists(networks, min_size=1, max_size=5))
def test_sources_print_as_they_parse(some: list[values.IPNetwork]) -> None:
    assume(sum(n.num_addresses for n in some if n.version == 4) < 2**31)
    assume(all(n.version == 4 or n.prefixlen > 5 for n in some))  # else they may be everybody
    sources = Sources.of(some)
    assert Sources.parse(str(sources)) == sources
    assert sources.versions == {n.version for n in some}
    assert all(n.network_address in sources for n in some)


def test_any_is_a_word_of_its_own() -> None:
    assert str(Sources.parse("any")) == "any"
    assert ip_address("2001:db8::1") in Sources.parse("any")
    assert Sources.parse("any").versions == {4, 6}
    for text in ("", "any,10.0.0.0/8", "10.0.0.0/8,", "ANY"):
        with pytest.raises(TextError):
            Sources.parse(text)
    for networks_, anyone in ((), False), ((ip_network("10.0.0.0/8"),), True):
        with pytest.raises(TextError, match="comma-separated, or the word any"):
            Sources(networks_, anyone=anyone)


@pytest.mark.parametrize(
    ("peer", "is_allowed"),
    [
        ("192.168.1.5", True),
        ("192.168.2.5", False),
        ("::ffff:192.168.1.5", True),
        ("::ffff:10.0.0.1", False),
        ("fe80::1%eth0", True),
        ("fd00::1", False),
    ],
)
def test_peers_are_unmapped_and_lose_their_zone_before_they_are_compared(peer: str, is_allowed: bool) -> None:
    assert (ip_address(peer) in Sources.parse("192.168.1.0/24,fe80::/10")) == is_allowed


@pytest.mark.parametrize(
    ("address", "text"), [("192.0.2.1", "192.0.2.1:80"), ("2001:db8::1", "[2001:db8::1]:80")]
)
def test_an_address_is_written_as_in_a_url(address: str, text: str) -> None:
    assert values.address_text(ip_address(address), 80) == text
    assert values.address_text(address, "80") == text


def test_of_a_long_text_the_beginning_is_quoted_so_that_what_is_wrong_with_it_can_be_read() -> None:
    with pytest.raises(TextError) as error:
        values.parse_printable("\U0001f600" * 20_000)
    assert str(error.value).startswith("'\\U0001f600")
    assert "... is not printable ASCII on one line" in str(error.value)
    assert len(str(error.value)) < 600
