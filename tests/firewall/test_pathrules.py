# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules for forwards by nft as text. `test_path` has the packets."""

import re
import shutil
import subprocess
from collections.abc import Iterable

import pytest
from bounds import BOUND_S

from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.values import TIME_MAX
from qubes_fwd_qrexec.firewall.pathrules import DRAIN_MAX_S, Kept, content
from qubes_fwd_qrexec.firewall.rule import Family
from qubes_fwd_qrexec.firewall.tables import (
    ADMITTED,
    ARRIVED,
    CUSTOM_FORWARD,
    CUSTOM_INPUT,
    FORWARD,
    INPUT,
    PREROUTING,
    REPLIES,
    SENT,
    Content,
    Place,
    Rule,
    Seen,
    SeenTable,
    transaction,
)
from qubes_fwd_qrexec.lab import netns

END = 1893456000
OUT = 'iifgroup 0 iifname != "lo"'
NOT_LO = "ip daddr != 127.0.0.0/8"
FROM = {"srchosts": "192.168.77.0/24,fd77::/64"}
NEXT = {"to4": "10.137.0.5", "to6": "fd09::5"}
WITH_TABLE = Seen(SeenTable({CUSTOM_INPUT: (), CUSTOM_FORWARD: ()}))


def config(
    role: str = "hop", ports: str = "80-80", to: str = "", key: str = "nft.work.web", **more: str
) -> Kept:
    options = {"version": "1", "role": role, "side": "outer", "proto": "tcp", "srcports": ports}
    options |= {"dstports": to or ports, **FROM}
    options |= more if "to4" in more or "to6" in more or role == "target" else {**NEXT, **more}
    line = " ".join(f"{name.replace('_', '-')}={value}" for name, value in options.items())
    return Kept(NftConfig.parse(key, line))


def draining(kept: Kept) -> Kept:
    return Kept(kept.config, is_draining=True)


def texts(found: Iterable[Rule]) -> list[str]:
    return [rule.text for rule in found]


def chains(found: Content) -> dict[str | Place, list[str]]:
    """The text of every chain that has rules."""
    made: dict[str | Place, list[str]] = {chain: texts(rules) for chain, rules in found.chains.items()}
    made |= {place: texts(rules) for place, rules in found.placed.items()}
    return {chain: rules for chain, rules in made.items() if rules}


def of(*forwards: Kept, family: Family = Family.IP) -> dict[str | Place, list[str]]:
    return chains(content(forwards, family))


def test_the_exposed_qube_sends_on_what_came_to_its_port_from_its_sources_and_nothing_else() -> None:
    through = "tcp dport 80 iifgroup 0 oifgroup 2 ip saddr 192.168.77.0/24 ip daddr 10.137.0.5"
    assert of(config(expire=f"{END}")) == {
        PREROUTING: [
            f"{OUT} {NOT_LO} fib daddr type local ip saddr 192.168.77.0/24 tcp dport 80 meta time < {END} "
            "counter name nft.work.web/new dnat to 10.137.0.5"
        ],
        ADMITTED: [
            f"{through} ct original proto-dst 80 meta time < {END} counter name nft.work.web/in accept",
            "tcp dport 80 ip daddr 10.137.0.5 ct original proto-dst 80 drop",
        ],
        REPLIES: [
            "tcp sport 80 iifgroup 2 oifgroup 0 ip saddr 10.137.0.5 ct original proto-dst 80 "
            "counter name nft.work.web/out",
            "tcp sport 80 iifgroup 2 oifgroup 0 ip saddr 10.137.0.5 ct original proto-dst 80 "
            f"meta time >= {END} drop",
        ],
        FORWARD: [f"{through} ct original proto-dst 80 meta time < {END} accept"],
    }


def test_the_last_hop_maps_to_the_targets_port_and_a_family_is_never_mixed_with_the_other() -> None:
    found = of(config(to="8080-8080", side="uplink"), family=Family.IP6)
    through = "tcp dport 8080 iifgroup 1 oifgroup 2 ip6 saddr fd77::/64 ip6 daddr fd09::5"
    assert found == {
        PREROUTING: [
            "iifgroup 1 fib daddr type local ip6 saddr fd77::/64 tcp dport 80 "
            "counter name nft.work.web/new dnat to [fd09::5]:8080"
        ],
        ADMITTED: [
            f"{through} ct original proto-dst 80 counter name nft.work.web/in accept",
            "tcp dport 8080 ip6 daddr fd09::5 ct original proto-dst 80 drop",
        ],
        REPLIES: [
            "tcp sport 8080 iifgroup 2 oifgroup 1 ip6 saddr fd09::5 ct original proto-dst 80 "
            "counter name nft.work.web/out"
        ],
        FORWARD: [f"{through} ct original proto-dst 80 accept"],
    }


def test_the_target_lets_in_by_its_uplink_whatever_its_address_is() -> None:
    inward = f"udp dport 53 iifgroup 1 ip saddr 192.168.77.0/24 {NOT_LO}"
    outward = "udp sport 53 oifgroup 1 ip daddr 192.168.77.0/24 ct direction reply"
    found = of(config("target", "53-53", side="uplink", proto="udp", expire=f"{END}"))
    assert found == {
        PREROUTING: [
            f"iifgroup 1 {NOT_LO} fib daddr type local ip saddr 192.168.77.0/24 udp dport 53 "
            f"meta time < {END} counter name nft.work.web/new"
        ],
        ARRIVED: [f"{inward} ct direction original counter name nft.work.web/in"],
        INPUT: [f"{inward} meta time < {END} accept", f"{inward} drop"],
        SENT: [f"{outward} meta time < {END} accept", f"{outward} drop"],
    }
    without_end = of(config("target", "53-53", side="uplink", proto="udp"))
    assert without_end[INPUT] == [f"{inward} accept"]
    # What it sends is let through anyway, but for what another forward drops that is over.
    assert SENT not in without_end
    both = of(
        config("target", "53-53", side="uplink", proto="udp"),
        config("target", "53-53", side="uplink", proto="udp", expire=f"{END}", key="nft.work.ends"),
    )
    assert both[SENT] == [f"{outward} meta time < {END} accept", f"{outward} accept", f"{outward} drop"]


@pytest.mark.parametrize(("family", "has"), [("4", [Family.IP]), ("6", [Family.IP6])])
def test_a_target_that_one_family_reaches_opens_for_that_alone(family: str, has: list[Family]) -> None:
    kept = config("target", side="uplink", family=family)
    assert [f for f in Family if of(kept, family=f)] == has


def test_a_hop_without_an_address_of_a_family_has_nothing_in_it() -> None:
    assert of(config(to4="10.137.0.5"), family=Family.IP6) == {}
    assert content([config(to4="10.137.0.5")], Family.IP6).objects == {}


def test_networks_that_overlap_or_touch_are_one_and_several_are_one_set() -> None:
    found = of(config(srchosts="10.0.0.0/9,10.128.0.0/9,10.1.2.3/32,192.168.0.7/32", to4="10.137.0.5"))
    assert "ip saddr { 10.0.0.0/8, 192.168.0.7/32 } tcp" in found[PREROUTING][0]


def test_anybody_is_no_network_and_a_listening_address_is_named() -> None:
    found = of(config(srchosts="any", to4="10.137.0.5", listen="192.168.77.1"))
    assert found[PREROUTING] == [
        f"{OUT} ip daddr 192.168.77.1 fib daddr type local tcp dport 80 "
        "counter name nft.work.web/new dnat to 10.137.0.5"
    ]
    assert "saddr" not in found[FORWARD][0]


def test_a_range_stays_as_it_is_or_is_shifted_port_by_port() -> None:
    assert of(config(ports="7000-7009"))[PREROUTING][0].endswith(" dnat to 10.137.0.5")
    shifted = config(ports="7000-7002", to="9000-9002", proto="udp")
    mapped = "udp dport map { 7000 : 9000, 7001 : 9001, 7002 : 9002 }"
    assert of(shifted)[PREROUTING][0].endswith(f" dnat to 10.137.0.5 : {mapped}")
    assert of(shifted, family=Family.IP6)[PREROUTING][0].endswith(f" dnat to [fd09::5] : {mapped}")
    assert of(shifted)[FORWARD][0].startswith("udp dport 9000-9002 ")
    assert of(shifted)[FORWARD][0].endswith(" ct original proto-dst 7000-7002 accept")


def test_what_one_forward_accepts_comes_before_what_any_other_drops() -> None:
    found = of(config(key="nft.work.a"), config(key="nft.work.b", ports="81-81"))
    assert [text.rpartition(" ")[2] for text in found[ADMITTED]] == ["accept", "accept", "drop", "drop"]
    ends = config("target", key="nft.work.a", side="uplink", expire=f"{END}")
    endless = config("target", key="nft.work.b", side="uplink")
    assert [text.rpartition(" ")[2] for text in of(ends, endless)[INPUT]] == ["accept", "accept", "drop"]


def test_limits_are_asked_before_a_connection_is_counted_and_sent_on() -> None:
    found = content([config(limits="connections:100,per-source:10,rate:5")], Family.IP)
    first = f"{OUT} {NOT_LO} fib daddr type local ip saddr 192.168.77.0/24 tcp dport 80"
    assert texts(found.chains[PREROUTING]) == [
        f"{first} limit rate over 5/second burst 5 packets drop",
        f"{first} add @nft.work.web/each.10 {{ ip saddr ct count over 10 }} drop",
        f"{first} add @nft.work.web/all.100 {{ meta l4proto ct count over 100 }} drop",
        f"{first} counter name nft.work.web/new dnat to 10.137.0.5",
    ]
    assert {kind for kind, _ in found.objects} == {"counter", "set"}
    other = content([config(limits="per-source:11")], Family.IP)
    assert ("set", "nft.work.web/each.11") in other.objects


def test_both_protocols_have_the_rules_of_each_and_limits_of_their_own() -> None:
    given = {"limits": "connections:7,per-source:2", "role": "hop"}
    told = {proto: content([config(proto=proto, **given)], Family.IP) for proto in ("tcp", "udp", "both")}
    for chain, rules in chains(told["both"]).items():
        each = [*chains(told["tcp"])[chain], *chains(told["udp"])[chain]]
        plain = [re.sub(r"@(\S+)\.(tcp|udp) ", r"@\1 ", text) for text in rules]
        assert sorted(plain) == sorted(each), chain
    sets = {name for kind, name in told["both"].objects if kind == "set"}
    each_set = ("each.2.tcp", "each.2.udp", "all.7.tcp", "all.7.udp")
    assert sets == {f"nft.work.web/{name}" for name in each_set}
    counters = [name for name in told["both"].objects if name[0] == "counter"]
    assert counters == [name for name in told["tcp"].objects if name[0] == "counter"]


def test_what_drains_lets_the_established_go_on_for_a_while_and_nobody_new_in() -> None:
    hop = config(expire=f"{END}", on_expire="drain")
    through = "tcp dport 80 iifgroup 0 oifgroup 2 ip saddr 192.168.77.0/24 ip daddr 10.137.0.5"
    established = (
        f"{through} ct original proto-dst 80 ct state established meta time < {END + DRAIN_MAX_S} "
        "counter name nft.work.web/in accept"
    )
    assert of(hop)[ADMITTED][0] == established
    over = of(draining(hop))
    assert over[ADMITTED] == [established, of(hop)[ADMITTED][-1]]
    assert PREROUTING not in over
    assert FORWARD not in over
    assert f"meta time >= {END + DRAIN_MAX_S} drop" in over[REPLIES][-1]
    target = config("target", side="uplink", expire=f"{END}", on_expire="drain")
    inward = f"tcp dport 80 iifgroup 1 ip saddr 192.168.77.0/24 {NOT_LO}"
    assert of(draining(target))[INPUT] == [
        f"{inward} ct state established meta time < {END + DRAIN_MAX_S} accept",
        f"{inward} drop",
    ]
    assert f"meta time < {END + DRAIN_MAX_S} accept" in of(draining(target))[SENT][0]


@pytest.mark.parametrize("on_expire", ["cut", "drain"])
def test_an_end_that_the_kernel_cannot_count_to_is_its_last_second(on_expire: str) -> None:
    for rules in of(config(expire=f"{TIME_MAX}", on_expire=on_expire)).values():
        timed = [text for text in rules if "time" in text]
        assert not [text for text in timed if not re.search("meta time (<|>=) 18446744073 ", text)]


def test_the_order_of_the_configuration_does_not_matter() -> None:
    one, other = config(key="nft.work.a"), config(key="nft.work.b", ports="81-81")
    assert content([one, other], Family.IP) == content([other, one], Family.IP)


PROBLEM = netns.why_unavailable() or (None if shutil.which("nft") else "the program 'nft' is missing")


@pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
@pytest.mark.parametrize("family", Family)
def test_nft_takes_the_rules_of_every_kind_of_forward(family: Family) -> None:
    """In a network namespace that nobody else sees, with Qubes' chains; nft only checks."""
    limits = "connections:5,per-source:2,rate:9"
    forwards = [
        config(key="nft.work.a", expire=f"{END}", on_expire="drain", limits=limits),
        config(key="nft.work.b", ports="7000-7003", to="9000-9003", proto="udp", expire=f"{TIME_MAX}"),
        config(key="nft.work.c", to="8080-8080", side="vifs"),
        config(key="nft.sys-vpn.d", ports="7000-7999", srchosts="any"),
        config(
            "target", key="nft.work.e", side="uplink", srchosts="10.0.0.0/8,192.168.0.0/16,fd00::/8,fe80::/64"
        ),
        draining(config("target", key="nft.Work_1.x.f", side="uplink", expire="1", on_expire="drain")),
    ]
    tables = f"add table {family} qubes\n" + "".join(
        f"add chain {family} qubes {chain}\n" for chain in (CUSTOM_INPUT, CUSTOM_FORWARD)
    )
    text = tables + transaction(family, content(forwards, family), WITH_TABLE, 0)
    subprocess.run(
        ["unshare", "--net", "nft", "--check", "-f", "-"], input=text, text=True, check=True, timeout=BOUND_S
    )
