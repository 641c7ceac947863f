# SPDX-License-Identifier: GPL-2.0-or-later
"""The input of ``qubes.ForwardRevoke`` in a target: everything that dom0 allows from now on.

It is a complete list and not a change, so a lost message does no harm: the next one says everything again,
and the target need not know what dom0 may still owe it. It is ASCII, one entry on each line:

    version=1 drains=keep
    keep 8080-8080 sys-net
    keep udp 53-53 sys-net
    drain 9000-9000 sys-net 3600

A line is about calls that carry TCP, unless it says ``udp``. A target that knows no UDP refuses such a list
as a whole, so dom0 names UDP only where the target offers its service. One that was started before its
template did refuses it all the same, and then gets it without UDP, of which it has nothing.

Calls under ``keep`` go on. Calls under ``drain`` take no new stream or flow, and are cut after so many
seconds. Every other call of our services in that target ends at once, mux call or single call. Calls that
drain since an earlier list go on to their own deadline, unless this list says ``drains=cut``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Self

from .errors import TextError
from .values import Proto, QubeName, TargetPorts, parse_number, parse_qube_name

VERSION = 1
# The most that the target reads: over a thousand entries, while qrexec allows 128 calls to a qube at once.
ALLOWANCE_MAX_BYTES = 65536
# A drain must end within a day; otherwise the rule would not really have ended.
DRAIN_MAX_S = 86_400
ANSWER_MAX_BYTES = 128
_UDP = "udp "
_KEEP_DRAINS, _CUT_DRAINS = "drains=keep", "drains=cut"
_ANSWER = re.compile(r"version=(\S+) ended=(\S+) draining=(\S+)\n?\Z", re.ASCII)


class Calls(NamedTuple):
    """All calls of one qube to exactly these ports of the target; a single call has the same port twice.

    ``proto`` is TCP or UDP: no call carries both.
    """

    ports: TargetPorts
    caller: QubeName
    proto: Proto = Proto.TCP

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``PORT-PORT CALLER`` or ``udp PORT-PORT CALLER``, spelled exactly as it is printed. Raises
        `TextError`."""
        about = text.removeprefix(_UDP)
        ports, _, caller = about.partition(" ")
        proto = Proto.TCP if about == text else Proto.UDP
        calls = cls(TargetPorts.parse(ports), parse_qube_name(caller), proto)
        if str(calls) != text:
            raise TextError(text, "PORT-PORT CALLER, always with two ports")
        return calls

    def __str__(self) -> str:
        return f"{_UDP if self.proto is Proto.UDP else ''}{self.ports} {self.caller}"


def _order(calls: Calls) -> tuple[str, str, int, int]:
    return calls.caller, calls.proto, calls.ports.first, calls.ports.last


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """Everything that dom0 allows towards one target; ``drains`` says after how many seconds each is cut.

    Raises `TextError` if something is both kept and drained, for a drain that takes too many seconds, and if
    the text is longer than a target reads.
    """

    keeps: frozenset[Calls] = frozenset()
    drains: Mapping[Calls, int] = field(default_factory=lambda: MappingProxyType({}))
    cuts_drains: bool = False

    def __post_init__(self) -> None:
        for calls, seconds in self.drains.items():
            if calls in self.keeps:
                raise TextError(str(calls), "named once: it is either kept or drained")
            if not 0 < seconds <= DRAIN_MAX_S:
                raise TextError(str(seconds), f"the seconds of a drain, 1 to {DRAIN_MAX_S}")
        if (size := len(str(self))) > ALLOWANCE_MAX_BYTES:
            raise TextError(f"{size} bytes", f"an allowance: at most {ALLOWANCE_MAX_BYTES} bytes")

    @property
    def of_tcp(self) -> "Allowance":
        """The same without UDP, as a target reads it that knows no UDP."""
        keeps = frozenset(calls for calls in self.keeps if calls.proto is Proto.TCP)
        drains = {calls: seconds for calls, seconds in self.drains.items() if calls.proto is Proto.TCP}
        return Allowance(keeps=keeps, drains=drains, cuts_drains=self.cuts_drains)

    @classmethod
    def parse(cls, untrusted_text: bytes) -> Self:
        """Parse what `str` prints, with the lines in any order. Raises `TextError` that quotes the line."""
        if len(untrusted_text) > ALLOWANCE_MAX_BYTES:
            raise TextError("more", f"an allowance: at most {ALLOWANCE_MAX_BYTES} bytes")
        try:
            first, *lines = untrusted_text.decode("ascii").split("\n")
        except UnicodeDecodeError:
            raise TextError("a byte past 127", "ASCII") from None
        if lines[-1:] != [""]:
            raise TextError(([first, *lines])[-1][:80], "the end of an allowance: it ends with its last line")
        cuts_drains = _head(first)
        keeps: set[Calls] = set()
        drains: dict[Calls, int] = {}
        for line in lines[:-1]:
            calls, seconds = _line(line)
            if calls in keeps or calls in drains:
                raise TextError(line, "named once: an earlier line has said so")
            if seconds is None:
                keeps.add(calls)
            else:
                drains[calls] = seconds
        return cls(keeps=frozenset(keeps), drains=drains, cuts_drains=cuts_drains)

    def __str__(self) -> str:
        lines = [f"version={VERSION} {_CUT_DRAINS if self.cuts_drains else _KEEP_DRAINS}"]
        lines += [f"keep {calls}" for calls in sorted(self.keeps, key=_order)]
        lines += [f"drain {calls} {self.drains[calls]}" for calls in sorted(self.drains, key=_order)]
        return "".join(f"{line}\n" for line in lines)


def _head(line: str) -> bool:
    """Parse the first line. Returns whether drains are cut."""
    version, _, drains = line.partition(" ")
    if version != f"version={VERSION}":
        raise TextError(
            line[:80], f"version={VERSION}, the one that this program reads; update the older one"
        )
    if drains not in (_KEEP_DRAINS, _CUT_DRAINS):
        raise TextError(line[:80], f"version={VERSION} {_KEEP_DRAINS} or version={VERSION} {_CUT_DRAINS}")
    return drains == _CUT_DRAINS


def _line(line: str) -> tuple[Calls, int | None]:
    """Parse another line: calls, and after how many seconds they are cut, or None if they are kept."""
    word, _, rest = line.partition(" ")
    try:
        if word == "keep":
            return Calls.parse(rest), None
        if word == "drain":
            calls, _, seconds = rest.rpartition(" ")
            return Calls.parse(calls), parse_number(seconds)
    except TextError as error:
        raise TextError(line[:80], f"right: {error}") from None
    raise TextError(line[:80], "keep [udp] PORT-PORT CALLER or drain [udp] PORT-PORT CALLER SECONDS")


@dataclass(frozen=True, slots=True)
class Revoked:
    """The target's answer: how many calls it ended, and how many drain now."""

    ended: int
    draining: int

    @classmethod
    def parse(cls, untrusted_answer: bytes) -> Self:
        """Parse what `str` prints. Raises `TextError`."""
        text = untrusted_answer[: ANSWER_MAX_BYTES + 1].decode("ascii", "replace")
        found = _ANSWER.match(text) if len(text) <= ANSWER_MAX_BYTES else None
        if found is None or found[1] != str(VERSION):
            raise TextError(text[:80], f"version={VERSION} ended=N draining=M")
        return cls(parse_number(found[2]), parse_number(found[3]))

    def __str__(self) -> str:
        return f"version={VERSION} ended={self.ended} draining={self.draining}"
