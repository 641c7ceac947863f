# SPDX-License-Identifier: GPL-2.0-or-later
"""A qube's answer when dom0 asks for the status of its forwards: one JSON document with a version.

The listener prints a `ListenerReport`, and the service ``qubes.ForwardStatus`` a `QubeReport` around it.
dom0 parses that as the document of an untrusted qube (`document`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Self

from .clientreport import CLIENTS_MAX, ClientReport
from .document import REPORT_MAX_BYTES, TEXT_MAX, VERSION, Reader, ReportError, dump, load
from .rules import Transport
from .values import Proto, QubeName, RuleName, TargetPorts, parse_qube_name, parse_rule_name

__all__ = ["REPORT_MAX_BYTES", "TEXT_MAX", "VERSION", "ReportError", "dump", "load"]

FORWARDS_MAX = 1000
PROBLEMS_MAX = 100
CALLS_MAX = 1000


class Way(StrEnum):
    """The state of the way to the target: of its mux call, or of the last call with ``transport=call``."""

    IDLE = "idle"
    """Nothing is open; the next connection opens it."""
    OPENING = "opening"
    OPEN = "open"
    REFUSED = "refused"
    """dom0 refused the last call (exit status 126)."""
    NO_SERVICE = "no-service"
    """The target lacks the service (exit status 127)."""
    FAILED = "failed"
    """The last call failed in another way."""


class Firewall(StrEnum):
    """Whether the exposed qube's own firewall lets in clients of one IP version."""

    OPEN = "open"
    CLOSED = "closed"
    UNKNOWN = "unknown"


class Answer(StrEnum):
    """The result of a test: of a server's port, or of a connection through a forward."""

    THROUGH = "through"
    REFUSED = "refused"
    SILENT = "silent"
    """There was no answer in time."""
    FAILED = "failed"


class Expects(StrEnum):
    """What a server seems to expect in front of a connection: the reason of a trial that is through."""

    V1 = "expects-v1"
    V2 = "expects-v2"
    """It may know version 1 as well."""
    NONE = "expects-none"


def _said(proto: Proto) -> dict[str, str]:
    """Nothing for TCP: a report without UDP is what it was before there was UDP."""
    return {"proto": proto} if proto is Proto.UDP else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardReport:
    """One forward. ``sent`` and ``received`` are bytes from and to clients; times are in UNIX seconds.

    Of UDP, ``connections`` are its flows, and ``dropped`` says for each reason how many datagrams it dropped.
    """

    target: QubeName
    name: RuleName
    since: int
    connections: int
    total: int
    refused: Mapping[str, int]
    sent: int
    received: int
    transport: Transport
    way: Way
    mux_calls: int
    is_listening: bool
    last_error: str | None = None
    last_error_at: int | None = None
    proto: Proto = Proto.TCP
    datagrams_sent: int = 0
    datagrams_received: int = 0
    dropped: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def as_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "target": self.target,
            "name": self.name,
            "since": self.since,
            "connections": self.connections,
            "total": self.total,
            "refused": dict(self.refused),
            "sent": self.sent,
            "received": self.received,
            "transport": self.transport,
            "way": self.way,
            "mux_calls": self.mux_calls,
            "is_listening": self.is_listening,
            "last_error": self.last_error,
            "last_error_at": self.last_error_at,
        }
        if self.proto is Proto.UDP:
            told |= _said(self.proto) | {
                "datagrams_sent": self.datagrams_sent,
                "datagrams_received": self.datagrams_received,
                "dropped": dict(self.dropped),
            }
        return told

    @classmethod
    def read(cls, untrusted: Reader) -> Self:
        return cls(
            target=untrusted.parsed("target", parse_qube_name),
            name=untrusted.parsed("name", parse_rule_name),
            since=untrusted.number("since"),
            connections=untrusted.number("connections"),
            total=untrusted.number("total"),
            refused=untrusted.counts("refused"),
            sent=untrusted.number("sent"),
            received=untrusted.number("received"),
            transport=untrusted.word("transport", Transport),
            way=untrusted.word("way", Way),
            mux_calls=untrusted.number("mux_calls"),
            is_listening=untrusted.flag("is_listening"),
            last_error=untrusted.optional("last_error", untrusted.text),
            last_error_at=untrusted.optional("last_error_at", untrusted.number),
            proto=untrusted.one_proto("proto"),
            datagrams_sent=untrusted.given("datagrams_sent", untrusted.number, 0),
            datagrams_received=untrusted.given("datagrams_received", untrusted.number, 0),
            dropped=untrusted.given("dropped", untrusted.counts, {}),
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """An entry of the configuration, by its key, that is not open, and why."""

    key: str
    text: str

    def as_json(self) -> dict[str, Any]:
        return {"key": self.key, "text": self.text}

    @classmethod
    def read(cls, untrusted: Reader) -> Self:
        return cls(untrusted.text("key"), untrusted.text("text"))


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainingReport:
    """A closed forward whose connections may finish; they are cut in ``left_s`` seconds."""

    target: QubeName
    name: RuleName
    connections: int
    left_s: int
    proto: Proto = Proto.TCP

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "name": self.name,
            "connections": self.connections,
            "left_s": self.left_s,
            **_said(self.proto),
        }

    @classmethod
    def read(cls, untrusted: Reader) -> Self:
        return cls(
            target=untrusted.parsed("target", parse_qube_name),
            name=untrusted.parsed("name", parse_rule_name),
            connections=untrusted.number("connections"),
            left_s=untrusted.number("left_s"),
            proto=untrusted.one_proto("proto"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerReport:
    """The listener of an exposed qube; ``left_out`` forwards are missing, as there are too many.

    ``draining`` are closed forwards: one may be there twice, and under ``forwards`` again. ``bugs``: how
    many bugs of its own it has met, each of which ended only what it happened to.

    ``clients`` are those that are connected, the last that moved first, and ``clients_left_out`` how many
    more there are. None: nobody asked for them, or the listener is too old to tell.
    """

    since: int
    forwards: tuple[ForwardReport, ...]
    problems: tuple[Problem, ...] = ()
    left_out: int = 0
    draining: tuple[DrainingReport, ...] = ()
    bugs: int = 0
    clients: tuple[ClientReport, ...] | None = None
    clients_left_out: int = 0

    def as_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "version": VERSION,
            "since": self.since,
            "forwards": [forward.as_json() for forward in self.forwards],
            "problems": [problem.as_json() for problem in self.problems],
            "left_out": self.left_out,
            "draining": [forward.as_json() for forward in self.draining],
            "bugs": self.bugs,
        }
        if self.clients is not None:
            told["clients"] = [client.as_json() for client in self.clients]
            told["clients_left_out"] = self.clients_left_out
        return told

    @classmethod
    def parse(cls, untrusted_answer: bytes) -> Self:
        """Raises `ReportError`."""
        return cls.read(Reader(load(untrusted_answer), "the listener's answer"))

    @classmethod
    def read(cls, untrusted: Reader) -> Self:
        untrusted.check_version()

        def clients(key: str) -> tuple[ClientReport, ...] | None:
            return untrusted.several(key, CLIENTS_MAX, ClientReport.read)

        return cls(
            since=untrusted.number("since"),
            forwards=untrusted.several("forwards", FORWARDS_MAX, ForwardReport.read),
            problems=untrusted.several("problems", PROBLEMS_MAX, Problem.read),
            left_out=untrusted.number("left_out"),
            draining=untrusted.several("draining", FORWARDS_MAX, DrainingReport.read),
            bugs=untrusted.number("bugs"),
            clients=untrusted.given("clients", clients, None),
            clients_left_out=untrusted.given("clients_left_out", untrusted.number, 0),
        )

    def find(self, target: str, name: str, proto: Proto = Proto.TCP) -> ForwardReport | None:
        for forward in self.forwards:
            if (forward.target, forward.name, forward.proto) == (target, name, proto):
                return forward
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallsReport:
    """The calls of our service that one qube has to exactly these ports of the target.

    ``draining`` of them take no new streams; the last of those is cut in ``drain_left_s`` seconds.
    """

    source: QubeName
    ports: TargetPorts
    mux_calls: int = 0
    singles: int = 0
    draining: int = 0
    drain_left_s: int | None = None
    proto: Proto = Proto.TCP

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "ports": str(self.ports),
            "mux_calls": self.mux_calls,
            "singles": self.singles,
            "draining": self.draining,
            "drain_left_s": self.drain_left_s,
            **_said(self.proto),
        }

    @classmethod
    def read(cls, untrusted: Reader) -> Self:
        return cls(
            source=untrusted.parsed("source", parse_qube_name),
            ports=untrusted.parsed("ports", TargetPorts.parse),
            mux_calls=untrusted.number("mux_calls"),
            singles=untrusted.number("singles"),
            draining=untrusted.number("draining"),
            drain_left_s=untrusted.optional("drain_left_s", untrusted.number),
            proto=untrusted.one_proto("proto"),
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of a test; ``reason`` is a word of `refusals.Refusal`, or empty."""

    answer: Answer
    reason: str
    text: str

    def as_json(self) -> dict[str, Any]:
        return {"answer": self.answer, "reason": self.reason, "text": self.text}

    @classmethod
    def parse(cls, untrusted_answer: bytes) -> Self:
        """Raises `ReportError`."""
        return cls.read(Reader(load(untrusted_answer), "the trial's answer"))

    @classmethod
    def read(cls, untrusted: Reader) -> Self:
        return cls(untrusted.word("answer", Answer), untrusted.text("reason"), untrusted.text("text"))


@dataclass(frozen=True, slots=True)
class FirewallReport:
    """The firewall by IP version; and the keys of forwards that it does not let in, or only in part, because
    the listener does not listen on their ports."""

    ip: Firewall = Firewall.UNKNOWN
    ip6: Firewall = Firewall.UNKNOWN
    waiting: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {"ip": self.ip, "ip6": self.ip6, "waiting": list(self.waiting)}

    @classmethod
    def parse(cls, untrusted_answer: bytes) -> Self:
        """Raises `ReportError`."""
        return cls.read(Reader(load(untrusted_answer), "what is said of the firewall"))

    @classmethod
    def read(cls, untrusted: Reader) -> Self:
        words = untrusted.word("ip", Firewall), untrusted.word("ip6", Firewall)
        return cls(*words, untrusted.texts("waiting", FORWARDS_MAX))


@dataclass(frozen=True, slots=True, kw_only=True)
class QubeReport:
    """A qube's complete answer. ``listener`` is None if none runs, or if it does not answer, which
    ``listener_problem`` says; ``trial`` is None if none was asked for.

    ``bugs``: how many the qube's service, as a target, has met since the qube started.
    """

    program: str
    listener: ListenerReport | None = None
    listener_problem: str | None = None
    calls: tuple[CallsReport, ...] = ()
    bugs: int = 0
    trial: Trial | None = None
    firewall: FirewallReport = FirewallReport()

    @classmethod
    def parse(cls, untrusted_answer: bytes) -> Self:
        """Raises `ReportError`."""
        untrusted = Reader(load(untrusted_answer), "the answer")
        untrusted.check_version()
        return cls(
            program=untrusted.text("program"),
            listener=untrusted.optional("listener", lambda key: ListenerReport.read(untrusted.inner(key))),
            listener_problem=untrusted.optional("listener_problem", untrusted.text),
            calls=untrusted.several("calls", CALLS_MAX, CallsReport.read),
            bugs=untrusted.number("bugs"),
            trial=untrusted.optional("trial", lambda key: Trial.read(untrusted.inner(key))),
            firewall=FirewallReport.read(untrusted.inner("firewall")),
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "program": self.program,
            "listener": None if self.listener is None else self.listener.as_json(),
            "listener_problem": self.listener_problem,
            "calls": [calls.as_json() for calls in self.calls],
            "bugs": self.bugs,
            "trial": None if self.trial is None else self.trial.as_json(),
            "firewall": self.firewall.as_json(),
        }
