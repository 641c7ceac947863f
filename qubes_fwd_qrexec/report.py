# SPDX-License-Identifier: GPL-2.0-or-later
"""What a qube answers when dom0 asks how its forwards are: one JSON document with a version.

The listener prints a `ListenerReport`, the service ``qubes.ForwardStatus`` a `QubeReport` around it, and
dom0 parses that as what it is: bytes of a qube that may lie. Sizes, types and charset are checked, and
what is not as it should be is refused as a whole. Keys that are unknown are passed over, so that a newer
qube may say more under the same version.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self, TypeVar

from .errors import ForwardError, TextError
from .rules import Transport
from .values import QubeName, RuleName, TargetPorts, parse_qube_name, parse_rule_name

VERSION = 1
# A thousand forwards with all that can be said of each, and room to spare.
REPORT_MAX_BYTES = 2 << 20
FORWARDS_MAX = 1000
PROBLEMS_MAX = 100
TUNNELS_MAX = 1000
REASONS_MAX = 32
# relay-behaviours 45: as a line of the log.
TEXT_MAX = 200
# Nothing counts further than a signed number of 64 bits.
_NUMBER_MAX = 2**63 - 1
_REASON = re.compile(r"[a-z][a-z-]{0,31}\Z", re.ASCII)
_PRINTABLE = re.compile(r"[\x20-\x7e]*\Z", re.ASCII)
_E = TypeVar("_E", bound=StrEnum)
_V = TypeVar("_V")


class ReportError(ForwardError):
    """An answer is no report; the text says where it is not, and repeats nothing of it unescaped."""


class Way(StrEnum):
    """How the way to the target is: its tunnel, or the calls of ``transport=call``."""

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
    """Whether the exposed qube's own firewall lets clients of one IP version in."""

    OPEN = "open"
    CLOSED = "closed"
    UNKNOWN = "unknown"


class Answer(StrEnum):
    """What came of a test: of a server's port, or of a stream through a forward."""

    THROUGH = "through"
    REFUSED = "refused"
    SILENT = "silent"
    """Nothing came within the time, neither yes nor no."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardReport:
    """One forward. ``sent`` and ``received`` are bytes from and to clients; times are UNIX seconds."""

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
    tunnels: int
    is_listening: bool
    last_error: str | None = None
    last_error_at: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {
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
            "tunnels": self.tunnels,
            "is_listening": self.is_listening,
            "last_error": self.last_error,
            "last_error_at": self.last_error_at,
        }

    @classmethod
    def read(cls, untrusted: "_Reader") -> Self:
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
            tunnels=untrusted.number("tunnels"),
            is_listening=untrusted.flag("is_listening"),
            last_error=untrusted.optional("last_error", untrusted.text),
            last_error_at=untrusted.optional("last_error_at", untrusted.number),
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """What of the configuration is not open, by its key, and why."""

    key: str
    text: str

    def as_json(self) -> dict[str, Any]:
        return {"key": self.key, "text": self.text}

    @classmethod
    def read(cls, untrusted: "_Reader") -> Self:
        return cls(untrusted.text("key"), untrusted.text("text"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerReport:
    """The listener of an exposed qube; ``left_out`` forwards are not told of, as there are too many."""

    since: int
    forwards: tuple[ForwardReport, ...]
    problems: tuple[Problem, ...] = ()
    left_out: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "since": self.since,
            "forwards": [forward.as_json() for forward in self.forwards],
            "problems": [problem.as_json() for problem in self.problems],
            "left_out": self.left_out,
        }

    @classmethod
    def parse(cls, untrusted_answer: bytes) -> Self:
        """Raises `ReportError`."""
        return cls.read(_Reader(load(untrusted_answer), "the listener's answer"))

    @classmethod
    def read(cls, untrusted: "_Reader") -> Self:
        untrusted.check_version()
        return cls(
            since=untrusted.number("since"),
            forwards=untrusted.several("forwards", FORWARDS_MAX, ForwardReport.read),
            problems=untrusted.several("problems", PROBLEMS_MAX, Problem.read),
            left_out=untrusted.number("left_out"),
        )

    def find(self, target: str, name: str) -> ForwardReport | None:
        for forward in self.forwards:
            if (forward.target, forward.name) == (target, name):
                return forward
        return None


@dataclass(frozen=True, slots=True)
class TunnelsReport:
    """How many tunnels one qube has to exactly these ports of the target."""

    source: QubeName
    ports: TargetPorts
    count: int

    def as_json(self) -> dict[str, Any]:
        return {"source": self.source, "ports": str(self.ports), "count": self.count}

    @classmethod
    def read(cls, untrusted: "_Reader") -> Self:
        return cls(
            untrusted.parsed("source", parse_qube_name),
            untrusted.parsed("ports", TargetPorts.parse),
            untrusted.number("count"),
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of the test that was asked for; ``reason`` is a word of `counters.Refusal`, or empty."""

    answer: Answer
    reason: str
    text: str

    def as_json(self) -> dict[str, Any]:
        return {"answer": self.answer, "reason": self.reason, "text": self.text}

    @classmethod
    def parse(cls, untrusted_answer: bytes) -> Self:
        """Raises `ReportError`."""
        return cls.read(_Reader(load(untrusted_answer), "the trial's answer"))

    @classmethod
    def read(cls, untrusted: "_Reader") -> Self:
        return cls(untrusted.word("answer", Answer), untrusted.text("reason"), untrusted.text("text"))


@dataclass(frozen=True, slots=True)
class FirewallReport:
    """The firewall by IP version, and the keys of those forwards that it does not let in, or not wholly,
    because their listener does not listen."""

    ip: Firewall = Firewall.UNKNOWN
    ip6: Firewall = Firewall.UNKNOWN
    waiting: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {"ip": self.ip, "ip6": self.ip6, "waiting": list(self.waiting)}

    @classmethod
    def parse(cls, untrusted_answer: bytes) -> Self:
        """Raises `ReportError`."""
        return cls.read(_Reader(load(untrusted_answer), "what is said of the firewall"))

    @classmethod
    def read(cls, untrusted: "_Reader") -> Self:
        words = untrusted.word("ip", Firewall), untrusted.word("ip6", Firewall)
        return cls(*words, untrusted.texts("waiting", FORWARDS_MAX))


@dataclass(frozen=True, slots=True, kw_only=True)
class QubeReport:
    """A qube's whole answer. ``listener`` is None where none runs; ``trial`` where none was asked for."""

    program: str
    listener: ListenerReport | None = None
    listener_problem: str | None = None
    tunnels: tuple[TunnelsReport, ...] = ()
    trial: Trial | None = None
    firewall: FirewallReport = FirewallReport()

    @classmethod
    def parse(cls, untrusted_answer: bytes) -> Self:
        """Raises `ReportError`."""
        untrusted = _Reader(load(untrusted_answer), "the answer")
        untrusted.check_version()
        return cls(
            program=untrusted.text("program"),
            listener=untrusted.optional("listener", lambda key: ListenerReport.read(untrusted.inner(key))),
            listener_problem=untrusted.optional("listener_problem", untrusted.text),
            tunnels=untrusted.several("tunnels", TUNNELS_MAX, TunnelsReport.read),
            trial=untrusted.optional("trial", lambda key: Trial.read(untrusted.inner(key))),
            firewall=FirewallReport.read(untrusted.inner("firewall")),
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "program": self.program,
            "listener": None if self.listener is None else self.listener.as_json(),
            "listener_problem": self.listener_problem,
            "tunnels": [tunnels.as_json() for tunnels in self.tunnels],
            "trial": None if self.trial is None else self.trial.as_json(),
            "firewall": self.firewall.as_json(),
        }


def load(untrusted_text: bytes) -> object:
    """The JSON value of an answer. Raises `ReportError`."""
    import json

    if len(untrusted_text) > REPORT_MAX_BYTES:
        raise ReportError(f"the answer has more than {REPORT_MAX_BYTES} bytes")
    try:
        # Whatever may stand in it is ASCII.
        value: object = json.loads(untrusted_text.decode("ascii"), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise ReportError("the answer is no JSON in ASCII") from None
    return value


def dump(value: Mapping[str, Any]) -> bytes:
    """One document, on one line."""
    import json

    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


class _Reader:
    """An object of the document whose members are checked as they are read; ``place`` is where it stands."""

    def __init__(self, untrusted_value: object, place: str) -> None:
        if not isinstance(untrusted_value, dict):
            raise ReportError(f"{place} must be an object")
        self._untrusted = untrusted_value
        self._place = place

    def check_version(self) -> None:
        version = self.number("version")
        if version != VERSION:
            raise ReportError(
                f"{self._place} is of version {version}, and this program reads {VERSION}; "
                "update the older of the two"
            )

    def number(self, key: str) -> int:
        untrusted = self._member(key)
        if type(untrusted) is not int or not 0 <= untrusted <= _NUMBER_MAX:
            raise self._error(key, "a whole number")
        return untrusted

    def flag(self, key: str) -> bool:
        untrusted = self._member(key)
        if not isinstance(untrusted, bool):
            raise self._error(key, "true or false")
        return untrusted

    def text(self, key: str) -> str:
        return self._text(key, self._member(key))

    def texts(self, key: str, most: int) -> tuple[str, ...]:
        return tuple(self._text(key, untrusted) for untrusted in self._list(key, most))

    def word(self, key: str, words: type[_E]) -> _E:
        try:
            return words(self.text(key))
        except ValueError:
            raise self._error(key, f"one of {', '.join(words)}") from None

    def parsed(self, key: str, parse: Callable[[str], _V]) -> _V:
        try:
            return parse(self.text(key))
        except TextError as error:
            raise self._error(key, error.expected) from None

    def counts(self, key: str) -> dict[str, int]:
        inner = self.inner(key)
        if len(inner._untrusted) > REASONS_MAX or not all(map(_REASON.match, inner._untrusted)):
            raise self._error(key, f"at most {REASONS_MAX} words with their numbers")
        return {reason: inner.number(reason) for reason in inner._untrusted}

    def optional(self, key: str, read: Callable[[str], _V]) -> _V | None:
        return None if self._member(key) is None else read(key)

    def several(self, key: str, most: int, read: Callable[["_Reader"], _V]) -> tuple[_V, ...]:
        untrusted = self._list(key, most)
        return tuple(read(_Reader(entry, f"{self._place}: {key}")) for entry in untrusted)

    def inner(self, key: str) -> "_Reader":
        return _Reader(self._member(key), f"{self._place}: {key}")

    def _text(self, key: str, untrusted: object) -> str:
        if not isinstance(untrusted, str) or len(untrusted) > TEXT_MAX or not _PRINTABLE.match(untrusted):
            raise self._error(key, f"printable ASCII, at most {TEXT_MAX} characters")
        return untrusted

    def _list(self, key: str, most: int) -> list[object]:
        untrusted = self._member(key)
        if not isinstance(untrusted, list) or len(untrusted) > most:
            raise self._error(key, f"a list of at most {most}")
        return untrusted

    def _member(self, key: str) -> object:
        if key not in self._untrusted:
            raise ReportError(f"{self._place}: {key} is missing")
        return self._untrusted[key]

    def _error(self, key: str, expected: str) -> ReportError:
        return ReportError(f"{self._place}: {key} must be {expected}")
