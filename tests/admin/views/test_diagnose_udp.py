# SPDX-License-Identifier: GPL-2.0-or-later
"""The way of UDP over qrexec, as diagnose walks it by what qubes say: dom0 knows no more than that."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from worlds import NOW, Command

from qubes_fwd_qrexec.common.report import (
    Answer,
    Firewall,
    FirewallReport,
    ForwardReport,
    ListenerReport,
    Problem,
    QubeReport,
    Trial,
    Way,
    dump,
)
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.values import Proto, QubeName, RuleName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore

ADD = ("add", "vault", "53", "--via", "sys-net", "--from", "any", "--name", "dns")
AT_EXPOSED = ["rule", "exposed qube", "applied", "listener", "firewall", "policy"]
TCP = ForwardReport(
    target=QubeName("vault"),
    name=RuleName("dns"),
    since=NOW,
    connections=0,
    total=0,
    refused={},
    sent=0,
    received=0,
    transport=Transport.MUX,
    way=Way.IDLE,
    mux_calls=0,
    is_listening=True,
)
UDP = replace(TCP, proto=Proto.UDP)
LISTENER = ListenerReport(since=NOW, forwards=(TCP, UDP))
FIREWALL = FirewallReport(Firewall.OPEN, Firewall.OPEN)
THROUGH = Trial(Answer.THROUGH, "", "a server listens")


class Asked(LabStore):
    """A lab whose qubes answer; ``trials`` are those of all but what works, by their arguments."""

    def __init__(self, lab: LabDirectory) -> None:
        super().__init__(lab)
        self.listener = LISTENER
        self.firewall = FIREWALL
        self.trials: dict[str, Trial] = {}
        self.asked: list[str] = []

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        argument = service.removeprefix("qubes.ForwardStatus+")
        self.asked.append(f"{qube} {argument}".rstrip())
        trial = self.trials.get(argument, THROUGH) if argument else None
        report = QubeReport(program="1", listener=self.listener, firewall=self.firewall, trial=trial)
        return dump(report.as_json())


Walk = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def qubes(lab: LabDirectory) -> Asked:
    return Asked(lab)


@pytest.fixture
def walked(qubes: Asked, forward: Command, over: Callable[..., Any]) -> Walk:
    """The steps of a forward that was added with these options."""

    def steps(*options: str) -> list[dict[str, Any]]:
        assert forward(*ADD, *options).status == 0
        qubes.asked.clear()
        found: list[dict[str, Any]] = over(qubes, "diagnose", "vault", "dns", "--json").json["steps"]
        return found

    return steps


def test_of_udp_the_target_is_asked_for_its_socket_and_a_call_is_made(qubes: Asked, walked: Walk) -> None:
    qubes.trials["udp.53"] = Trial(Answer.REFUSED, "loopback", "udp port 53: a server listens at 127.0.0.1")
    steps = walked("--proto", "udp")
    assert [step["step"] for step in steps] == [*AT_EXPOSED, "target", "service", "server", "round trip"]
    assert {step["verdict"] for step in steps} == {"ok"}
    assert qubes.asked == ["sys-net", "vault udp.53", "sys-net udp.vault.dns"]
    assert steps[3]["text"] == "sys-net listens on udp port 53"
    assert steps[5]["text"] == "dom0 allows qubes.ForwardUDP from sys-net to vault"
    # That is where a call gets to.
    assert steps[8]["text"] == "in vault, udp port 53: a server listens at 127.0.0.1"
    assert steps[9]["text"] == (
        "a call for UDP from sys-net reached vault; no packet was sent, so only a client can tell "
        "whether the server answers"
    )


def test_of_both_each_is_walked(qubes: Asked, walked: Walk) -> None:
    steps = walked("--proto", "both")
    assert [step["step"] for step in steps] == [
        *("rule", "exposed qube", "applied", "listener", "listener", "firewall", "policy"),
        *("target", "service", "server", "server", "round trip", "round trip"),
    ]
    assert qubes.asked == [
        *("sys-net", "vault 53", "vault udp.53"),
        *("sys-net fwd.vault.dns", "vault proxy.53", "sys-net udp.vault.dns"),
    ]
    assert steps[6]["text"] == "dom0 allows qubes.ForwardTCP and qubes.ForwardUDP from sys-net to vault"
    # A rule with UDP cannot have proxy=v1.
    assert steps[11]["text"].endswith("without a PROXY header (if the server expects one, set proxy=v2)")


@pytest.mark.parametrize(
    ("trial", "cause", "text"),
    [
        (
            Trial(Answer.REFUSED, "server", "udp port 53: nothing listens there"),
            "no-server",
            "nothing listens",
        ),
        (Trial(Answer.REFUSED, "whatever a qube says", "x"), "no-server", "x"),
    ],
)
def test_a_port_where_nothing_listens_ends_the_walk(
    qubes: Asked, walked: Walk, trial: Trial, cause: str, text: str
) -> None:
    qubes.trials["udp.53"] = trial
    last = walked("--proto", "udp")[-1]
    assert (last["step"], last["verdict"], last["cause"]) == ("server", "stops", cause)
    assert text in last["text"]
    assert last["remedy"] == (
        "start the server in vault, and have it listen on 127.0.0.1; 'ss -lun' there shows who listens"
    )


@pytest.mark.parametrize(
    ("answer", "at"), [(Answer.THROUGH, "it is at 10.0.0.1"), (Answer.REFUSED, "it is at 127.0.0.53")]
)
def test_a_server_where_no_call_gets_ends_the_walk(
    qubes: Asked, walked: Walk, answer: Answer, at: str
) -> None:
    qubes.trials["udp.53"] = Trial(answer, "not-at-loopback", at)
    last = walked("--proto", "udp")[-1]
    assert (last["step"], last["verdict"], last["cause"]) == ("server", "stops", "not-at-loopback")
    assert last["text"] == f"in vault, {at}"
    assert last["remedy"] == (
        "write 'udp 53 ADDRESS' in /usr/local/etc/qubes-forward/servers.conf in vault, with that address, "
        "or eth0 for the qube's own; or have the server listen on 127.0.0.1"
    )


def test_where_the_target_does_not_know_it_is_unknown_and_the_walk_goes_on(
    qubes: Asked, walked: Walk
) -> None:
    qubes.trials["udp.53"] = Trial(Answer.FAILED, "", "the kernel does not say")
    *_, server, last = walked("--proto", "udp")
    assert (server["verdict"], last["step"]) == ("unknown", "round trip")
    assert server["text"] == (
        "vault does not say whether a server listens: the kernel does not say; 'ss -lnu' in vault shows "
        "where servers listen"
    )


def test_a_call_for_udp_that_does_not_get_to_the_target_ends_the_walk(qubes: Asked, walked: Walk) -> None:
    qubes.trials["udp.vault.dns"] = Trial(Answer.REFUSED, "policy", "dom0 refused the call")
    last = walked("--proto", "both")[-1]
    assert (last["step"], last["cause"]) == ("round trip", "policy")
    assert last["text"] == "a call for UDP from sys-net did not reach vault: dom0 refused the call"


def test_the_protocol_that_is_not_open_is_named(qubes: Asked, walked: Walk) -> None:
    qubes.listener = replace(LISTENER, forwards=(TCP,), problems=(Problem("udp.vault.dns", "it is in use"),))
    last = walked("--proto", "both")[-1]
    assert (last["step"], last["cause"]) == ("listener", "failed")
    assert last["text"] == "sys-net does not have its UDP open: it is in use"


def test_what_the_firewall_waits_for_ends_the_walk_for_either_protocol(qubes: Asked, walked: Walk) -> None:
    qubes.firewall = replace(FIREWALL, waiting=("udp.vault.dns",))
    last = walked("--proto", "both")[-1]
    assert (last["step"], last["cause"]) == ("firewall", "firewall")
    assert last["text"].startswith("sys-net does not have its UDP open: its firewall lets nobody in")


@pytest.mark.parametrize(("has", "is_older"), [((TCP,), True), ((UDP,), False)])
def test_a_listener_that_may_know_no_udp_is_to_be_updated(
    qubes: Asked, walked: Walk, has: tuple[ForwardReport, ...], is_older: bool
) -> None:
    qubes.listener = replace(LISTENER, forwards=has)
    last = walked("--proto", "both")[-1]
    assert (last["step"], last["cause"]) == ("listener", "not-yet")
    assert ("reads everything again; an older qubes-fwd-qrexec there" in last["remedy"]) is is_older


def test_udp_is_walked_where_tcp_goes_over_the_stock_service(
    qubes: Asked, walked: Walk, lab: LabDirectory
) -> None:
    lab.set_feature("vault", "supported-rpc.qubes.ForwardTCP", "")
    steps = walked("--proto", "both")
    assert [(step["step"], step["verdict"]) for step in steps[-7:]] == [
        *(("target", "ok"), ("service", "unknown"), ("server", "unknown"), ("service", "ok")),
        *(("server", "ok"), ("round trip", "ok"), ("round trip", "ok")),
    ]
    assert qubes.asked == ["sys-net", "vault udp.53", "sys-net fwd.vault.dns", "sys-net udp.vault.dns"]
