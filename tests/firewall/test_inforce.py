# SPDX-License-Identifier: GPL-2.0-or-later
"""What is known to be in force through changes that fail, ends that fail, and a program that is killed."""

import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.values import ListenPorts, Proto, Sources, TargetPorts
from qubes_fwd_qrexec.firewall.cutting import TCP_HOLD_S, Cut, CutError, Cutter
from qubes_fwd_qrexec.firewall.inforce import IN_FORCE, InForce
from qubes_fwd_qrexec.firewall.openings import openings
from qubes_fwd_qrexec.firewall.pathrules import Kept
from qubes_fwd_qrexec.firewall.rule import Family, NftError
from qubes_fwd_qrexec.firewall.tables import CUSTOM_FORWARD, CUSTOM_INPUT, Seen, SeenTable
from qubes_fwd_qrexec.firewall.wanted import Firewall, Wanted

WEB = NftConfig.parse(
    "nft.work.web",
    "version=1 role=hop side=outer proto=tcp srcports=80-80 dstports=80-80 srchosts=192.0.2.0/24 "
    "to4=10.137.0.5",
)
NARROWER = replace(WEB, sources=Sources.parse("192.0.2.0/25"))
WIDER = replace(WEB, sources=Sources.parse("192.0.2.0/23"))
OTHER = replace(WEB, name="other", listen_ports=ListenPorts(81, 81), target_ports=TargetPorts(81, 81))


class Tool:
    """A firewall with Qubes' chains in one family; and the order in which everything is done."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.nft_fails = False
        self.end_fails = False
        self.ended: list[tuple[set[Cut], set[Cut]]] = []
        self.last = ""

    def look(self) -> dict[Family, Seen]:
        return {Family.IP: Seen(SeenTable({CUSTOM_FORWARD: (), CUSTOM_INPUT: ()}))}

    def carry_out(self, transaction: str) -> None:
        if self.nft_fails:
            raise NftError("nft is missing")
        self.last = transaction
        self.done.append("rules")

    def end(self, gone: Collection[Cut], living: Collection[Cut]) -> int:
        self.ended.append((set(gone), set(living)))
        self.done.append("end")
        if self.end_fails:
            raise CutError("the kernel does not delete connections: Device or resource busy")
        return 1


@pytest.fixture
def tool() -> Tool:
    return Tool()


def opened(tool: Tool, path: Path | None = None) -> InForce:
    return InForce(Firewall(tool), Cutter(tool.end), path)


def wanted(*configs: NftConfig) -> Wanted:
    return Wanted(paths=tuple(map(Kept, configs)))


@pytest.mark.parametrize("after", [[], [NARROWER], [OTHER]])
def test_what_goes_is_ended_after_its_rules_are_out_and_held_before(
    tool: Tool, after: list[NftConfig]
) -> None:
    in_force = opened(tool)
    in_force.put(wanted(WEB))
    assert tool.done == ["rules"]
    assert "guard-input meta" not in tool.last
    in_force.put(wanted(*after))
    assert tool.done == ["rules", "rules", "end"]
    assert "guard-input meta time" in tool.last
    assert tool.ended == [({WEB}, set(after))]


def test_what_lets_in_as_many_as_before_ends_nobody(tool: Tool) -> None:
    in_force = opened(tool)
    for configs in ([WEB], [WIDER, OTHER], [replace(WIDER, expire=1_900_000_000), OTHER]):
        in_force.put(wanted(*configs))
    assert tool.ended == []


def test_what_drains_is_not_over(tool: Tool) -> None:
    in_force = opened(tool)
    in_force.put(wanted(WEB))
    in_force.put(Wanted(paths=(Kept(WEB, is_draining=True),)))
    assert tool.ended == []
    in_force.put(wanted())
    assert tool.ended == [({WEB}, set())]


def test_what_could_not_be_ended_is_told_and_tried_again(
    tool: Tool, caplog: pytest.LogCaptureFixture
) -> None:
    in_force = opened(tool)
    in_force.put(wanted(WEB))
    assert not in_force.is_due
    tool.end_fails = True
    in_force.put(wanted(OTHER))
    assert in_force.is_due
    assert in_force.problem == "the kernel does not delete connections: Device or resource busy"
    assert str(in_force.problem) in caplog.text
    assert (in_force.sure, in_force.configs) == ({OTHER}, {WEB, OTHER})
    with pytest.raises(CutError, match="busy"):
        in_force.clear()
    tool.end_fails = False
    in_force.put(wanted(OTHER))
    assert tool.ended[-1] == ({WEB}, {OTHER})
    assert (in_force.problem, in_force.configs) == (None, {OTHER})
    assert not in_force.is_due


def test_a_guard_that_is_over_is_taken_away_though_nothing_has_changed(tool: Tool) -> None:
    now_s = [1_800_000_000.0]
    in_force = InForce(Firewall(tool), Cutter(tool.end, lambda: now_s[0]))
    in_force.put(wanted(WEB))
    in_force.put(wanted())
    assert not in_force.is_due
    now_s[0] += TCP_HOLD_S + 3600
    assert in_force.is_due
    in_force.put(wanted())
    assert not in_force.is_due


def test_nothing_is_ended_while_its_rules_may_be_there(tool: Tool) -> None:
    in_force = opened(tool)
    in_force.put(wanted(WEB))
    tool.nft_fails = True
    with pytest.raises(NftError):
        in_force.put(wanted(OTHER))
    assert tool.ended == []
    tool.nft_fails = False
    in_force.put(wanted())
    assert tool.ended == [({WEB, OTHER}, set())]


def test_a_run_after_one_that_was_killed_ends_what_that_had_let_through(
    tool: Tool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / IN_FORCE
    first = opened(tool, path)
    first.put(wanted(WEB))
    tool.nft_fails = True
    with pytest.raises(NftError):  # and that was its end: perhaps with these rules, perhaps with those
        first.put(wanted(OTHER))
    tool.nft_fails = False
    with path.open("a") as file:
        file.write("nft.work.bad version=9\nrubbish\n")
    with caplog.at_level(logging.WARNING):
        second = opened(tool, path)
    assert len(caplog.messages) == 2
    second.put(wanted(OTHER))
    assert tool.ended == [({WEB}, {OTHER})]
    assert opened(tool, path).configs == {OTHER}
    second.clear()
    assert opened(tool, path).configs == set()


def test_a_record_that_cannot_be_written_keeps_nothing_from_being_closed(
    tool: Tool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_force = opened(tool, tmp_path / "missing" / IN_FORCE)
    in_force.put(wanted(WEB))
    in_force.put(wanted())
    assert tool.ended == [({WEB}, set())]
    assert "No such file or directory" in caplog.text


def test_what_fails_in_one_family_keeps_nothing_open_in_the_other() -> None:
    class Refusing(Tool):
        def look(self) -> dict[Family, Seen]:
            return dict.fromkeys(Family, super().look()[Family.IP])

        def carry_out(self, transaction: str) -> None:
            self.nft_fails = " ip qubes" in transaction
            super().carry_out(transaction)

    tool = Refusing()
    both = NftConfig.parse(
        "nft.work.web",
        "version=1 role=target side=uplink proto=tcp srcports=80 dstports=80 srchosts=any",
    )
    with pytest.raises(NftError, match="nft is missing"):
        Firewall(tool).keep(Wanted(paths=(Kept(both),)))
    assert " ip6 qubes" in tool.last


DNS = ListenerConfig.parse(
    "udp.work.dns",
    "version=1 service=qubes.ForwardUDP transport=mux side=outer listen=0.0.0.0 "
    "srcports=53-54 dstports=53-54 srchosts=192.0.2.0/24",
)
(OPENED,) = openings(DNS)


def flowing(config: ListenerConfig = DNS, *, at: tuple[int, ...] = (53, 54)) -> Wanted:
    """A forward of UDP, and the ports on which the listener listens."""
    listening = frozenset((Proto.UDP, config.listen[0], port) for port in at)
    return Wanted((config,), listening, frozenset({config}))


def test_flows_end_with_the_forward_and_with_the_listeners_socket(tool: Tool) -> None:
    in_force = opened(tool)
    in_force.put(flowing())
    assert "udp dport 53-54 accept" in tool.last
    in_force.put(flowing(at=(53,)))
    (rest,) = openings(DNS, flowing(at=(53,)).listening)
    assert tool.ended == [({OPENED}, {rest})]
    assert "guard-output meta time" in tool.last
    in_force.put(wanted())
    assert tool.ended[1:] == [({rest}, set())]
    in_force.put(wanted(WEB))
    assert len(tool.ended) == 2


def test_flows_go_on_while_nobody_loses_anything(tool: Tool) -> None:
    in_force = opened(tool)
    wider = replace(DNS, sources=Sources.parse("192.0.2.0/23"), expire=1_900_000_000)
    for one in (flowing(), flowing(wider), replace(flowing(wider), configs=())):  # the last one drains
        in_force.put(one)
    assert tool.ended == []


def test_a_run_after_one_that_was_killed_ends_the_flows_that_it_had_let_in(
    tool: Tool, tmp_path: Path
) -> None:
    path = tmp_path / IN_FORCE
    first = opened(tool, path)
    first.put(flowing())
    second = opened(tool, path)
    assert (second.configs, second.flows) == (set(), {DNS})
    second.put(flowing())
    assert tool.ended == []
    third = opened(tool, path)
    third.put(wanted())
    assert tool.ended == [({OPENED}, set())]
    assert opened(tool, path).flows == set()


def test_flows_that_could_not_be_ended_are_tried_again(tool: Tool) -> None:
    in_force = opened(tool)
    in_force.put(flowing())
    tool.end_fails = True
    in_force.put(wanted())
    assert in_force.is_due
    tool.end_fails = False
    in_force.put(wanted())
    assert tool.ended == [({OPENED}, set())] * 2
    assert not in_force.is_due
