# SPDX-License-Identifier: GPL-2.0-or-later
"""The numbers and options of the listener's manual page are those of the code."""

import argparse
import logging
import re
from pathlib import Path

import pytest

from qubes_fwd_qrexec.admin.views import carried
from qubes_fwd_qrexec.common import config
from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.exposed import (
    callbudget,
    callqueue,
    callwaits,
    connectionlog,
    counters,
    flowcounters,
    flowpool,
    flowtable,
    limits,
    listener,
    listeneroptions,
    muxpool,
    qrexec,
    unopened,
)
from qubes_fwd_qrexec.exposed.call import CallTimeouts
from qubes_fwd_qrexec.relay import acceptloop, flowqueue, idleness, patience
from qubes_fwd_qrexec.system import deadpeers, logs, qubesdbsource
from qubes_fwd_qrexec.target import callservice, localserver

PAGE = (Path(__file__).parents[1] / "docs" / "qubes-forward-listener.rst").read_text()
STATUS_PAGE = (Path(__file__).parents[1] / "docs" / "qvm-forward-list.rst").read_text()
GUIDE = (Path(__file__).parents[1] / "docs" / "guide" / "who-connected.md").read_text()
CONFIG = (
    "version=1 service=qubes.ForwardTCP transport=mux side=outer listen=0.0.0.0 srcports=80-80 "
    "dstports=80-80 srchosts=any"
)
# As it is read, without line breaks and marks; a row of the table is one sentence then.
READ = re.sub(r"\s+", " ", PAGE.replace("`", "").replace("*", ""))
UNITS = {"ms": 0.001, "s": 1, "second": 1, "min": 60, "minute": 60, "minutes": 60, "h": 3600}
WORDS = {"a": 1, "each": 1, "half a": 0.5, "five": 5, "five times": 5, "three quarters": 0.75}
TIMEOUTS = CallTimeouts()
GONE_S = deadpeers.IDLE_S + deadpeers.COUNT * deadpeers.INTERVAL_S
VCHANS_OF_A_QUBE = 30
FLOW_IDLE_S = flowtable.ANSWERED_S, flowtable.UNANSWERED_S

# A sentence, and what the code has for each {} in it: a number, or a time in seconds.
SAID: list[tuple[str, tuple[float, ...]]] = [
    ("when the first connection comes and kept for {} after the last", (muxpool.LINGER_S,)),
    ("takes new connections over it for {}; then", (callservice.LEASE_S,)),
    ("learns of a change within {}.", (listener.LOOK_S,)),
    (
        "is tried again after {}, and ever more slowly up to once {};",
        (unopened.RETRY_FIRST_S, unopened.RETRY_MAX_S),
    ),
    ("connects again, at first after {} and then after up to {}.", qubesdbsource.BACKOFF_S),
    ("dom0 is asked again at most every {} while", (callwaits.AGAIN_S,)),
    ("closes all ports at once, and gives connections {} to finish;", (listener.DRAIN_S,)),
    ("closes all ports at once and gives connections {}.", (listener.DRAIN_S,)),
    ("connections of all forwards {} at most,", (limits.PROCESS_MAX,)),
    ("and one for each {} KiB of the qube's memory", (limits.MEMORY_EACH_BYTES >> 10,)),
    ("at the time: {} with 400 MiB.", (limits.Process(memory=lambda: 400 << 20).connections_max,)),
    ("connections of a forward {} three", (limits.Process(memory=lambda: 1 << 40).rule_max,)),
    ("each of its ports takes {} connections at most", (60_999 - 32_768 + 1,)),
    ("connections of a forward from one client {} as", (limits.PER_SOURCE,)),
    ("new connections of a forward in a second {} more", (limits.RATE,)),
    ("With few open files allowed, {} of these", (limits.process_max(1000) / 1000,)),
    ("nothing moves in a connection {} many", (TIMEOUTS.idle_s,)),
    ("one side has ended, and nothing moves {} what", (TIMEOUTS.half_close_s,)),
    ("one side has ended, and nothing moves {} what", (idleness.HALF_CLOSE_S,)),
    ("the server in the target does not accept {} it", (localserver.CONNECT_TIMEOUT_S,)),
    ("dom0 and the target have not taken a call {} as", (TIMEOUTS.call_s,)),
    ("dom0 and the target have not taken a call {} as", (muxpool.OPEN_S,)),
    ("a mux call's service says nothing {} the", (muxpool.HELLO_S,)),
    ("no place among the calls of this qube {} longer", (callwaits.WAIT_S,)),
    (
        # Two lines of the table, whose columns alternate.
        "a silent peer is asked whether it is there after {}, then given up after {}, and not after the two "
        "hours {} of Linux",
        (deadpeers.IDLE_S, GONE_S, deadpeers.INTERVAL_S),
    ),
    ("the peer does not acknowledge bytes {} at least", (GONE_S,)),
    ("the target takes nothing over a mux call {} it may be paused", (patience.PAUSE_S,)),
    ("A flow ends when nothing has moved in it for {}, or for {} if", FLOW_IDLE_S),
    ("what the call has not taken within {} is dropped;", (flowqueue.WAIT_S,)),
    ("before the call is through, {}. Each datagram", (flowpool.WAIT_S,)),
    ("Flows have limits of their own: {} for all forwards", (flowtable.FLOWS_MAX,)),
    ("gives up one in which nothing has moved for {}, since many", (flowtable.QUIET_S,)),
    ("looks for them every {};", (idleness.LOOK_TICKS * idleness.TICK_S,)),
    ("tries again {} in a second.", (1 / acceptloop.SHORTAGE_PAUSE_S,)),
    ("At most {} such lines are written in a second", (connectionlog.LINES_PER_S,)),
    ("after a burst of {};", (connectionlog.BURST,)),
    ("Of each other kind of trouble there is at most one line in {},", (logs.REPEAT_S,)),
    ("Further ones wait for up to {}.", (callwaits.WAIT_S,)),
    ("The default, {}, leaves", (config.CALLS_MAX,)),
    ("is made with --buffer-size={}, which", (qrexec.SINGLE_BUFFER_BYTES,)),
    ("when another one ends, or after {}, for", (callwaits.AGAIN_S,)),
    ("or after 2 s, for up to {};", (callwaits.WAIT_S,)),
    ("it is taken for a refusal after {}.", (callwaits.DOUBT_S,)),
    ("At most {} connections wait for a call", (callqueue.WAITING_MAX,)),
    ("and at most {} calls begin together", (callbudget.BEGIN_MAX,)),
    ("begin together, {} of them to one target", (callbudget.BEGIN_OF_ONE_MAX,)),
    ("held back: until any call has ended, or for {}.", (callwaits.AGAIN_S,)),
    ("and {} more may be renewals", (callbudget.RENEWALS_MAX,)),
    ("The listener makes at most {} calls at once", (config.CALLS_MAX,)),
    ("have not taken within so long. The default is {}, as long", (TIMEOUTS.call_s,)),
    ("anew every {} whether", (callservice.LEASE_S * muxpool.RENEW_AT_SHARE,)),
    ("for so long after its last connection. The default is {}.", (muxpool.LINGER_S,)),
    ("direction for so long. The default is {}. --connections", (TIMEOUTS.idle_s,)),
    ("together may have. The default is {}, or", (limits.PROCESS_MAX,)),
]


def number(said: str) -> float:
    """What ``16,384``, ``10 s``, ``half a second`` and ``five times`` mean."""
    amount, _, unit = said.rpartition(" ")
    if unit not in UNITS:
        amount, unit = said, "s"
    return UNITS[unit] * (WORDS[amount] if amount in WORDS else float(amount.replace(",", "")))


@pytest.mark.parametrize(("sentence", "values"), SAID)
def test_a_number_of_the_page_is_the_one_in_the_code(sentence: str, values: tuple[float, ...]) -> None:
    pattern = re.escape(sentence).replace(r"\{\}", r"([\w.,]+(?: [a-z]+){0,2}?)")
    (found,) = re.finditer(pattern, READ)
    assert tuple(map(number, found.groups())) == values


def test_no_limit_goes_unchecked() -> None:
    """Each row of the table is in a sentence above."""
    _, ruler, rows = re.split(r"^(=+ +=+ +=+)$", PAGE, flags=re.MULTILINE)[2:5]
    width = ruler.index(" ")
    limited = [line[:width].strip() for line in rows.splitlines() if line[:1].strip()]
    assert len(limited) == 13
    sentences = [sentence for sentence, _ in SAID]
    assert [what for what in limited if not any(s.startswith(what) for s in sentences)] == []


def words_of(introduction: str) -> set[str]:
    """The words that a list of the page explains, after its introduction."""
    listed = PAGE.split(introduction)[1].split("\n\n")[1]
    return {
        word
        for line in re.findall(r"^``.*``$", listed, re.MULTILINE)
        for word in line.strip("`").split("``, ``")
    }


def test_every_word_for_how_a_connection_or_flow_ends_is_explained_and_no_other() -> None:
    assert words_of("*seconds*. *how* is one of:") == set(connectionlog.How)
    assert words_of("Its *how* is one of:") == set(connectionlog.FlowHow)


def test_every_field_of_the_journal_is_on_the_page_and_in_the_guide_and_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    log, web = connectionlog.ConnectionLog(), config.ListenerConfig.parse("fwd.work.web", CONFIG)
    opened = log.opened(web, lambda: ("192.168.0.7", 4000), 80)
    log.ended(opened, web, counters.Carried(0.0), connectionlog.How.CLOSED)
    fields = {name for record in caplog.records for name in record.fields}  # type: ignore[attr-defined]
    said = PAGE.partition("Where standard error is the journal")[2].partition("\n\n")[0]
    assert set(re.findall(r"\*(FORWARD[A-Z_]*)\*", said)) == fields
    rows = re.findall(r"^\| (`.*?) \|", GUIDE, re.MULTILINE)
    assert set(re.findall("`([A-Z_]+)`", " ".join(rows))) == fields


def test_every_reason_why_something_is_refused_or_dropped_is_on_both_pages_and_no_other() -> None:
    refusals = {*limits.NotAdmitted, *Refusal, connectionlog.How.MADE_ROOM}
    # Of these it is the target that speaks: see qubes.ForwardStatus.
    refusals -= {Refusal.LOOPBACK, Refusal.NOT_AT_LOOPBACK, Refusal.ELSEWHERE}
    _, refused, dropped = re.split(r"Reasons are |datagrams by\s+reason\.", PAGE.split("metrics.sock")[0])
    assert set(re.findall("``([a-z-]+)``", refused.split(".\n")[0])) == refusals
    assert set(re.findall("``([a-z-]+)``:", dropped)) == set(flowcounters.Dropped)
    _, refused, dropped = re.split(r"as \*refused\*;|were \*dropped\*:", STATUS_PAGE)
    assert set(re.findall("``([a-z-]+)``(?:, |\n)", refused)) == refusals
    assert set(re.findall("``([a-z-]+)``(?:, |\n)", dropped)) == set(flowcounters.Dropped)
    assert carried.REFUSED.keys() == refusals | set(flowcounters.Dropped)


def test_all_calls_together_are_fewer_than_a_qube_has_room_for() -> None:
    assert config.CALLS_MAX + callbudget.RENEWALS_MAX < VCHANS_OF_A_QUBE


def test_every_option_of_the_program_is_on_the_page_and_the_other_way_round() -> None:
    options = {
        option
        for action in listeneroptions.parser()._actions
        for option in action.option_strings
        if option.startswith("--") and action.help is not argparse.SUPPRESS
    }
    described = set(re.findall(r"^(--[a-z][a-z-]*)", PAGE, re.MULTILINE))
    assert described == options - {"--help"}
    synopsis = PAGE.partition("SYNOPSIS")[2].partition("DESCRIPTION")[0]
    assert set(re.findall(r"--[a-z-]+", synopsis)) == described - {"--version"}
