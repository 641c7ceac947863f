# SPDX-License-Identifier: GPL-2.0-or-later
"""What a row finds: lines of one value for each peer, from rounds in which the peers take turns.

Each round begins with another peer, so that what else the machine does meets all alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from .processes import BenchError


class Named(Protocol):
    """What has a column in a table."""

    name: ClassVar[str]
    title: ClassVar[str]


class Staged(Protocol):
    """What has peers, and can have the load measure one of them."""

    @property
    def peers(self) -> Sequence[Any]: ...

    def ask(self, peer: Any, order: str, within_s: float = ..., **details: Any) -> dict[str, Any]: ...


AnyPeer = TypeVar("AnyPeer", bound=Named)
AnySample = TypeVar("AnySample")
Samples = Mapping[str, list[float]]
Take = Callable[[list[float]], float]


@dataclass(slots=True)
class Line:
    """One line of the table: a value for each peer that could be measured."""

    key: str
    title: str
    unit: str
    is_less_better: bool = True
    # Whether it compares peers, or only shows what the lab adds to each of them.
    is_compared: bool = True
    values: dict[str, float] = field(default_factory=dict)
    # The same of each round alone, where there are rounds.
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def fill(self, found: Mapping[str, Sequence[list[float]]], take: Take) -> "Line":
        """Take the values from all samples of a peer, and from those of each of its rounds."""
        for name, rounds in found.items():
            self.values[name] = take([sample for samples in rounds for sample in samples])
            self.rounds[name] = [take(samples) for samples in rounds]
        return self


@dataclass(slots=True)
class Result:
    """What a row found: its lines, the sizes of its samples, and what failed, in words."""

    samples: str
    lines: list[Line]
    notes: list[str] = field(default_factory=list)


def turns(peers: Sequence[AnyPeer], rounds: int) -> Iterator[AnyPeer]:
    """All peers in each round, which begins with another of them each time."""
    for number in range(rounds):
        first = number % len(peers)
        yield from (*peers[first:], *peers[:first])


def collect(
    peers: Sequence[AnyPeer], rounds: int, sample: Callable[[AnyPeer], AnySample]
) -> tuple[dict[str, list[AnySample]], list[str]]:
    """By peer what each round found, and what failed. A peer that fails is left out with all its rounds."""
    found: dict[str, list[AnySample]] = {}
    failed: dict[str, str] = {}
    for peer in turns(peers, rounds):
        if peer.name not in failed:
            try:
                found.setdefault(peer.name, []).append(sample(peer))
            except BenchError as error:
                failed[peer.name] = f"{peer.title} failed: {error}"
    return {name: values for name, values in found.items() if name not in failed}, list(failed.values())


def each(samples: Samples, take: Take) -> dict[str, float]:
    """One value for each peer that has samples."""
    return {name: take(values) for name, values in samples.items() if values}


def p99(values: Sequence[float]) -> float:
    """The value that one sample in a hundred exceeds."""
    return sorted(values)[max(0, -(-len(values) * 99 // 100) - 1)]
