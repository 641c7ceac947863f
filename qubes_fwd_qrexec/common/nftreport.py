# SPDX-License-Identifier: GPL-2.0-or-later
"""A qube's answer when dom0 asks what its firewall does for forwards by nft: one JSON document.

The service ``qubes.ForwardNft`` prints an `NftReport`. dom0 parses it as the document of an untrusted qube
(`document`): a qube that lies can hide what it forwards, and dom0 says no more than what it was told.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from .document import VERSION, Reader, load
from .errors import ConfigError, TextError
from .nftconfig import parse_nft_key
from .report import FORWARDS_MAX, PROBLEMS_MAX, Problem

_FAMILIES_MAX = 2


class Why(StrEnum):
    """Why a forward that is configured is not in force."""

    NO_TABLE = "no-table"
    """The firewall has no place for its IP versions: no table of Qubes', or none with the user's chains."""
    OVER = "over"
    """Its time is over, by the qube's clock; ``draining`` says whether live connections may finish."""
    FAILED = "failed"
    """nft has refused it, or cannot be run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathReport:
    """One forward in one qube of its path.

    ``digest`` is that of the `NftConfig` that is in force, in each IP version of it that the firewall has a
    place for; None if none is, and then ``why`` says why. ``draining`` is whether connections may finish,
    though no new ones are let in. The numbers count since the forward came into force: new connections, also
    those of clients that got no answer; packets and bytes from clients, and bytes to them, which the target
    does not count.
    """

    key: str
    digest: str | None = None
    why: Why | None = None
    draining: bool = False
    connections: int = 0
    packets: int = 0
    sent: int = 0
    received: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "digest": self.digest,
            "why": self.why,
            "draining": self.draining,
            "connections": self.connections,
            "packets": self.packets,
            "sent": self.sent,
            "received": self.received,
        }

    @classmethod
    def read(cls, untrusted: Reader) -> Self:
        return cls(
            key=untrusted.parsed("key", _key),
            digest=untrusted.optional("digest", untrusted.text),
            why=untrusted.optional("why", lambda key: untrusted.word(key, Why)),
            draining=untrusted.flag("draining"),
            connections=untrusted.number("connections"),
            packets=untrusted.number("packets"),
            sent=untrusted.number("sent"),
            received=untrusted.number("received"),
        )


def _key(untrusted_key: str) -> str:
    try:
        parse_nft_key(untrusted_key)
    except ConfigError:
        raise TextError(untrusted_key, "nft.TARGET.NAME") from None
    return untrusted_key


@dataclass(frozen=True, slots=True, kw_only=True)
class NftReport:
    """What a qube's firewall does for forwards by nft.

    ``versions``: the IP versions, of 4 and 6, that its firewall has a place for. ``refused`` are entries of
    its configuration that cannot be read; nothing is in force for those. ``problem``: why the firewall is not
    as it should be, if nft fails. ``left_out`` forwards are missing, as there are too many.
    """

    program: str
    versions: frozenset[int]
    forwards: tuple[PathReport, ...] = ()
    refused: tuple[Problem, ...] = ()
    problem: str | None = None
    left_out: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "program": self.program,
            "families": [f"ip{'6' if version == 6 else ''}" for version in sorted(self.versions)],
            "forwards": [forward.as_json() for forward in self.forwards],
            "refused": [problem.as_json() for problem in self.refused],
            "problem": self.problem,
            "left_out": self.left_out,
        }

    @classmethod
    def parse(cls, untrusted_answer: bytes) -> Self:
        """Raises `ReportError`."""
        untrusted = Reader(load(untrusted_answer), "the firewall's answer")
        untrusted.check_version()
        families = untrusted.texts("families", _FAMILIES_MAX)
        return cls(
            program=untrusted.text("program"),
            versions=frozenset(version for word, version in (("ip", 4), ("ip6", 6)) if word in families),
            forwards=untrusted.several("forwards", FORWARDS_MAX, PathReport.read),
            refused=untrusted.several("refused", PROBLEMS_MAX, Problem.read),
            problem=untrusted.optional("problem", untrusted.text),
            left_out=untrusted.number("left_out"),
        )

    def find(self, key: str) -> PathReport | None:
        """What is said of one forward, by the key of its configuration."""
        return next((forward for forward in self.forwards if forward.key == key), None)
