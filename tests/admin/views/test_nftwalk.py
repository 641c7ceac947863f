# SPDX-License-Identifier: GPL-2.0-or-later
"""Each thing that can be wrong on the way of a forward by nft, as diagnose tells it from what qubes say."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from nftlab import FEATURE, NftLab, forgets, hangs
from worlds import ADD, Command

from qubes_fwd_qrexec.admin.answers import AnswerError, NotRunningError
from qubes_fwd_qrexec.common.nftreport import NftReport, Why
from qubes_fwd_qrexec.lab.qube import QubeState

ALL = ["rule", "path", "applied", "hop", "hop", "target", "server"]
Diagnosed = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def forward(run: Command) -> Command:
    """With one forward that works."""
    assert run(*ADD).status == 0
    return run


@pytest.fixture
def diagnosed(forward: Command) -> Diagnosed:
    """The steps; where one stops it is the last, with a cause and a remedy that names its commands."""

    def steps() -> list[dict[str, Any]]:
        result = forward("diagnose", "work", "web", "--json")
        found: list[dict[str, Any]] = result.json["steps"]
        stopping = [step for step in found if step["verdict"] == "stops"]
        assert stopping in ([], found[-1:])
        assert result.json["is_well"] == (not stopping) == (result.status == 0)
        for step in found:
            assert bool(step["remedy"]) == bool(step["cause"]) == (step["verdict"] == "stops"), step
            assert all(f"'{' '.join(words)}'" in step["remedy"] for words in step["ways_out"])
        return found

    return steps


def wrong(steps: list[dict[str, Any]], step: str, cause: str) -> str:
    """What the last step says and what helps; it must stop the walk."""
    last = steps[-1]
    assert (last["step"], last["verdict"], last["cause"]) == (step, "stops", cause), last
    return f"{last['text']} | {last['remedy']}"


def test_each_qube_is_looked_at_in_the_order_in_which_packets_go(
    forward: Command, diagnosed: Diagnosed, nft_lab: NftLab
) -> None:
    steps = diagnosed()
    assert [step["step"] for step in steps] == ALL
    assert [step["text"] for step in steps[1:]] == [
        "packets go sys-net (outer side) - sys-firewall (10.137.0.6) - work (10.137.0.10)",
        "dom0's policy and what the qubes are told match the rule",
        "sys-net forwards IPv4: 3 connections and 40 packets so far",
        "sys-firewall forwards IPv4: 3 connections and at least 40 packets so far",
        "work lets in IPv4: 3 connections and 40 packets so far",
        "in work, the server listens at 0.0.0.0",
    ]
    out = forward("diagnose", "work", "web").out
    assert out.endswith("packets do not reach the first qube whose counts stay the same.\n")
    assert "Everything on the way to the server works" not in out  # nothing was sent


@pytest.mark.parametrize(
    ("qube", "cause"),
    [("sys-net", "exposed-halted"), ("sys-firewall", "hop-halted"), ("work", "target-halted")],
)
def test_a_qube_of_the_path_that_is_halted(
    diagnosed: Diagnosed, nft_lab: NftLab, qube: str, cause: str
) -> None:
    nft_lab.lab.set_state(qube, QubeState.HALTED)
    assert wrong(diagnosed(), "path", cause).endswith(f" | 'qvm-start {qube}'")


def test_what_the_plan_finds_is_said_with_its_ways_out(diagnosed: Diagnosed, nft_lab: NftLab) -> None:
    """The helper is there and switched on, and addresses are known, or the forward is not live."""
    nft_lab.lab.set_feature("sys-firewall", "service.qubes-forward-nft", "")
    said = wrong(diagnosed(), "rule", "nft-switched-off")
    assert "'qvm-service sys-firewall qubes-forward-nft on'" in said


def test_qubes_that_are_not_told_what_the_rule_asks_for(diagnosed: Diagnosed, nft_lab: NftLab) -> None:
    nft_lab.lab.remove_feature("sys-net", FEATURE)
    nft_lab.lab.set_feature("work", FEATURE, nft_lab.lab.features("sys-firewall")[FEATURE])
    assert wrong(diagnosed(), "applied", "not-applied") == (
        "sys-net has no configuration for it; work has another configuration for it | 'qvm-forward apply'"
    )


def but(**changed: Any) -> Callable[[NftReport], NftReport]:
    """What a qube says with something of its forward changed."""
    return lambda report: replace(report, forwards=tuple(replace(f, **changed) for f in report.forwards))


def only(*versions: int) -> Callable[[NftReport], NftReport]:
    return lambda report: replace(report, versions=frozenset(versions))


@pytest.mark.parametrize(
    ("says", "cause", "text", "remedy"),
    [
        (
            forgets,
            "not-in-force",
            "sys-firewall does not have it in force",
            "'systemctl restart qubes-forward-nft' in sys-firewall reads everything again",
        ),
        (
            but(digest="f" * 16),
            "other-in-force",
            "sys-firewall has another entry of it in force, which may let in more",
            "'systemctl restart qubes-forward-nft' in sys-firewall reads everything again",
        ),
        (
            only(6),
            "no-family",
            "sys-firewall forwards no IPv4",
            "'qvm-forward set work web srchosts=NETWORKS'",
        ),
        (
            but(digest=None, why=Why.NO_TABLE),
            "no-table",
            "sys-firewall has no Qubes firewall",
            "'systemctl restart qubes-iptables' in sys-firewall loads Qubes' firewall again",
        ),
        (
            but(digest=None, why=Why.OVER),
            "over",
            "sys-firewall says that it has expired",
            "'sudo qvm-sync-clock' in sys-firewall",
        ),
        (
            but(digest=None, why=Why.FAILED),
            "failed",
            "sys-firewall cannot put it in force",
            "'systemctl status qubes-forward-nft' in sys-firewall says why",
        ),
        (
            lambda _: AnswerError("no such service", 127),
            "no-service",
            "sys-firewall does not have qubes-fwd-qrexec",
            "install or update qubes-fwd-qrexec in fedora-42, shut fedora-42 down, and start",
        ),
        (hangs, "no-answer", "sys-firewall does not answer: it hangs", "check sys-firewall, or restart it"),
        (
            lambda _: AnswerError("refused", 126),
            "no-answer",
            "sys-firewall does not answer: refused",
            "sys-firewall may not take any more calls",
        ),
        (
            lambda _: AnswerError("qubes.ForwardNft ended with exit status 125", 125),
            "no-answer",
            "sys-firewall does not answer: qubes-forward-nft is not running there, or the call failed (exit "
            "status 125)",
            "restart sys-firewall, if its service qubes-forward-nft was switched on after it started",
        ),
        (
            lambda _: AnswerError("down", way_out="'qvm-forward-lab up'"),
            "no-answer",
            "sys-firewall does not answer: down",
            "'qvm-forward-lab up'",
        ),
    ],
)
def test_a_hop_that_does_not_confirm_it_ends_the_walk_with_what_helps(
    diagnosed: Diagnosed, nft_lab: NftLab, says: Any, cause: str, text: str, remedy: str
) -> None:
    nft_lab.says["sys-firewall"] = says
    steps = diagnosed()
    assert [step["step"] for step in steps] == ALL[:5]
    said = wrong(steps, "hop", cause)
    assert said.startswith(text)
    assert remedy in said.partition(" | ")[2]


def test_a_target_whose_input_is_closed(diagnosed: Diagnosed, nft_lab: NftLab) -> None:
    nft_lab.says["work"] = forgets
    assert wrong(diagnosed(), "target", "not-in-force").startswith("work does not have it in force")


def test_a_qube_that_stops_meanwhile_does_not_answer(diagnosed: Diagnosed, nft_lab: NftLab) -> None:
    nft_lab.says["sys-firewall"] = lambda _: NotRunningError("it was halted a moment ago")
    said = wrong(diagnosed(), "hop", "no-answer")
    assert (
        said == "sys-firewall does not answer: it was halted a moment ago | check sys-firewall, or restart it"
    )


DOES_NOT_SAY = "tcp.8080 failed", "work does not say whether a server listens: the server; "
NOTHING = but(connections=0, packets=0)


def test_counts_show_between_which_qubes_packets_get_lost(diagnosed: Diagnosed, nft_lab: NftLab) -> None:
    nft_lab.says["sys-firewall"] = NOTHING
    steps = diagnosed()
    assert [step["verdict"] for step in steps] == ["ok", "ok", "ok", "ok", "note", "ok", "ok"]
    assert steps[4]["text"] == (
        "sys-firewall forwards IPv4, and has seen nothing of the 3 connections and 40 packets at sys-net: "
        "they got lost before sys-firewall, unless it was started since"
    )
    nft_lab.says["sys-net"] = NOTHING
    texts = [step["text"] for step in diagnosed()]
    assert texts[3:5] == [
        "sys-net forwards IPv4, and has seen no packets yet",
        "sys-firewall forwards IPv4, and has seen no packets yet",
    ]


def test_the_rules_of_a_client_itself_are_named_where_clients_are_qubes(
    forward: Command, diagnosed: Diagnosed
) -> None:
    forward("set", "work", "web", "forwardtype=internal", "srchosts=10.137.0.0/16")
    steps = diagnosed()
    assert [step["step"] for step in steps] == [
        "rule",
        "path",
        "applied",
        "hop",
        "target",
        "client",
        "server",
    ]
    assert (steps[5]["verdict"], steps[5]["text"]) == (
        "unknown",
        "the firewall rules of a client itself (personal, sys-vpn) are not checked: 'qvm-firewall CLIENT "
        "list' shows them, and it is let out by 'qvm-firewall CLIENT add --before=0 accept "
        "dsthost=10.137.0.10 proto=tcp dstports=8080'",
    )
    forward("set", "work", "web", "srchosts=personal")
    assert "itself (personal) are not checked: 'qvm-firewall personal list' shows" in diagnosed()[-2]["text"]
    forward("set", "work", "web", "srchosts=192.168.0.0/16")
    assert "itself (no qube may come) are not checked" in diagnosed()[-2]["text"]


@pytest.mark.parametrize(
    ("listens", "cause", "text", "remedy"),
    [
        (
            "tcp.8080 loopback",
            "loopback",
            "in work, the server",
            "have it listen at more than loopback addresses, such as at 0.0.0.0 and ::; or send it over "
            "qrexec, which gets to 127.0.0.1, too: 'qvm-forward set work web mode=qrexec'",
        ),
        (
            "tcp.8080 server",
            "no-server",
            "in work, the server",
            "start the server in work, and have it listen at more than loopback addresses, such as at "
            "0.0.0.0 and ::",
        ),
    ],
)
def test_a_server_to_which_packets_do_not_get(
    diagnosed: Diagnosed, nft_lab: NftLab, listens: str, cause: str, text: str, remedy: str
) -> None:
    nft_lab.listens = listens
    assert wrong(diagnosed(), "server", cause) == f"{text} | {remedy}"


def test_of_udp_flows_are_counted_and_its_server_is_looked_for_too(
    forward: Command, diagnosed: Diagnosed, nft_lab: NftLab
) -> None:
    forward("set", "work", "web", "proto=udp")
    nft_lab.listens = "udp.8080"
    steps = diagnosed()
    assert steps[-1]["verdict"] == "ok"
    assert steps[3]["text"] == "sys-net forwards IPv4: 3 UDP flows and 40 packets so far"
    nft_lab.listens = "udp.8080 loopback"
    assert wrong(diagnosed(), "server", "loopback").endswith("'qvm-forward set work web mode=qrexec'")


def test_of_a_forward_of_both_the_servers_of_both_are_looked_for(
    forward: Command, diagnosed: Diagnosed, nft_lab: NftLab
) -> None:
    forward("set", "work", "web", "proto=both")
    steps = diagnosed()
    assert [step["step"] for step in steps] == [*ALL, "server"]
    assert steps[3]["text"] == "sys-net forwards IPv4: 3 connections and UDP flows and 40 packets so far"
    assert steps[-1]["text"].endswith("; 'ss -lnu' in work shows where servers listen")
    forward("set", "work", "web", "forwardtype=internal", "srchosts=personal")
    (client,) = (step["text"] for step in diagnosed() if step["step"] == "client")
    assert client.endswith("proto=udp dstports=8080'")
    assert client.count("--before=0 accept dsthost=10.137.0.10 proto=") == 2


def test_where_a_target_does_not_say_where_servers_listen_the_command_that_does_is_named(
    diagnosed: Diagnosed, nft_lab: NftLab
) -> None:
    for listens, why in (
        ("", "whether a server listens on more than 127.0.0.1 is not known: "),
        DOES_NOT_SAY,
    ):
        nft_lab.listens = listens
        last = diagnosed()[-1]
        assert (last["step"], last["verdict"]) == ("server", "unknown")
        assert last["text"].startswith(why)
        assert last["text"].endswith("; 'ss -lnt' in work shows where servers listen")
