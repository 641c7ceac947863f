# SPDX-License-Identifier: GPL-2.0-or-later
"""The result for a rule: the findings of its checks, and the forward whose state follows from them.

There is no prose here: a finding is a cause with its facts, and `views.reasons` puts it into words.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from qubes_fwd_qrexec.common.config import ListenerConfig, Service, Side
from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.rules import BrokenRule, Mode, NamedRule, Transport
from qubes_fwd_qrexec.common.values import IPAddress, IPNetwork, QubeName, Sources

from .inventory import Inventory, TunnelMark

Key = tuple[QubeName, str]
"""Target and name of a rule."""


class State(StrEnum):
    """The state of a rule, as every listing shows it."""

    ACTIVE = "active"
    WAITING = "waiting"
    SUSPENDED = "suspended"
    EXPIRED = "expired"
    DISABLED = "disabled"
    REFUSED = "refused"
    BROKEN = "broken"
    HELD = "held"


class Verdict(StrEnum):
    """What a finding means for its rule."""

    OK = "ok"
    NOTE = "note"
    STOPS = "stops"


class Cause(StrEnum):
    """What was found, as a word for programs, with its check, its verdict, and the state that it leads to."""

    def __new__(
        cls, word: str, check: str = "", verdict: Verdict = Verdict.STOPS, state: State = State.REFUSED
    ) -> "Cause":
        cause = str.__new__(cls, word)
        cause._value_ = word
        cause.check, cause.verdict, cause.state = check, verdict, state
        return cause

    check: str
    verdict: Verdict
    state: State

    OPEN = "open", "", Verdict.OK, State.ACTIVE
    EXPOSED_HALTED = "exposed-halted", "", Verdict.NOTE, State.WAITING
    HOP_HALTED = "hop-halted", "", Verdict.NOTE, State.WAITING
    TARGET_HALTED = "target-halted", "", Verdict.NOTE, State.WAITING
    CLONED = "cloned", "owner", Verdict.STOPS, State.SUSPENDED
    NETVM_CHANGED = "netvm-changed", "path", Verdict.STOPS, State.SUSPENDED
    EXPIRED = "expired", "expiry", Verdict.STOPS, State.EXPIRED
    DISABLED = "disabled", "switch", Verdict.STOPS, State.DISABLED
    NO_SUCH_QUBE = "no-such-qube", "qubes"
    UNREADABLE_QUBE = "unreadable-qube", "qubes"
    UNFIT_QUBE = "unfit-qube", "qubes"
    NO_NETVM = "no-netvm", "qubes"
    NETVM_BROKEN = "netvm-broken", "path"
    NO_SERVICE = "no-service", "service"
    TUNNEL = "tunnel-in-the-path", "tunnel"
    NO_IP_PATH = "no-ip-path", "packets"
    NFT_BEHIND_TUNNEL = "nft-behind-tunnel", "tunnel"
    NO_NFT_SERVICE = "no-nft-service", "service"
    NFT_SWITCHED_OFF = "nft-switched-off", "service"
    NFT_AT_WHONIX = "nft-at-whonix", "service"
    NO_ADDRESS = "no-address", "packets"
    LINK_LOCAL = "link-local", "packets"
    NFT_LOOPBACK = "nft-at-loopback", "packets"
    CONFLICT = "conflict", "ports"
    TOO_LARGE = "too-large", "ports"
    SOURCE_ELSEWHERE = "source-elsewhere", "sources"
    NO_SOURCE = "no-source", "sources"
    HELD = "held", "hold", Verdict.STOPS, State.HELD
    UNREADABLE = "unreadable", "", Verdict.STOPS, State.BROKEN

    IN_TIME = "in-time", "expiry", Verdict.OK
    ANYBODY = "anybody", "sources", Verdict.NOTE
    SOURCES = "sources", "sources", Verdict.OK
    SOURCE_NOBODY = "source-nobody", "sources", Verdict.NOTE
    TAG_ELSEWHERE = "tag-elsewhere", "sources", Verdict.NOTE
    SOURCE_NETVM = "source-netvm", "sources", Verdict.NOTE
    SIDE = "side", "side", Verdict.OK
    OWN = "own", "owner", Verdict.OK
    NO_OWNER = "no-owner", "owner", Verdict.NOTE
    AGREED = "agreed", "path", Verdict.OK
    FOLLOWS = "follows-netvm", "path", Verdict.OK
    NO_PATH = "no-path", "path", Verdict.NOTE
    NO_DISPOSABLES = "no-disposables", "", Verdict.NOTE
    NO_TUNNEL = "no-tunnel", "tunnel", Verdict.OK
    WITHIN_TUNNEL = "within-tunnel", "tunnel", Verdict.OK
    BYPASSES_TUNNEL = "bypasses-tunnel", "tunnel", Verdict.NOTE
    PERHAPS_TUNNEL = "perhaps-tunnel", "tunnel", Verdict.NOTE
    STOCK_SERVICE = "stock-service", "", Verdict.NOTE
    IPV4_ALONE = "ipv4-alone", "packets", Verdict.NOTE


class Finding(NamedTuple):
    """What one check found. It has the facts that its cause needs.

    ``qube`` is the qube that it is about, with its ``side``; ``rival`` is another rule, ``mark`` that of a
    tunnel, ``number`` one of ports or calls, or an IP version. ``case`` tells cases of one cause apart.
    ``detail`` is the text of an error, or a word for what was found.
    """

    cause: Cause
    qube: QubeName | None = None
    side: Side | None = None
    mark: TunnelMark | None = None
    rival: NamedRule | None = None
    number: int = 0
    detail: str = ""
    case: str = ""


OPEN = Finding(Cause.OPEN)
Config = ListenerConfig | NftConfig
"""What a qube is told about a forward: a listener, or a firewall on the path."""


class LetIn(NamedTuple):
    """A qube that a rule lets in, the name for it there (its own, or ``@tag:NAME``), and its addresses."""

    name: str
    qube: QubeName
    addresses: tuple[IPNetwork, ...]


class Forward(NamedTuple):
    """One rule with everything that follows from it.

    ``findings`` are in the order in which they were made, and all are there: that the rule is disabled hides
    no tunnel. ``chain`` are the netvms of its target. ``exposed`` is where it listens, or would listen, and
    ``side`` that by which connections may come. ``mode`` is how they travel, and never ``auto``. ``service``
    and ``transport`` are those of qrexec, of TCP if the rule is about both protocols; the service is None if
    the target cannot be reached by it. ``configs`` are what qubes are told, the target first and the exposed
    qube last; there are some exactly when the forward is live. ``sources`` are all whom it lets in, as
    networks, None if that is nobody; ``let_in`` those of them that the rule names.
    """

    named: NamedRule
    findings: tuple[Finding, ...] = ()
    chain: tuple[QubeName, ...] = ()
    exposed: QubeName | None = None
    side: Side | None = None
    mode: Mode = Mode.QREXEC
    service: Service | None = None
    transport: Transport = Transport.AUTO
    configs: tuple[tuple[QubeName, Config], ...] = ()
    sources: Sources | None = None
    let_in: tuple[LetIn, ...] = ()

    @property
    def is_live(self) -> bool:
        """Whether policy and configuration are given out: now (active) or for the next start (waiting)."""
        return bool(self.configs)

    @property
    def listener_configs(self) -> tuple[ListenerConfig, ...]:
        """What the listener is told, if it is live and goes over qrexec: of both protocols, TCP first."""
        return tuple(config for _, config in self.configs if isinstance(config, ListenerConfig))

    @property
    def nft_configs(self) -> tuple[tuple[QubeName, NftConfig], ...]:
        """What the qubes of its path are told, if it is live and goes by nft: the exposed qube last."""
        return tuple((qube, config) for qube, config in self.configs if isinstance(config, NftConfig))

    @property
    def stops(self) -> tuple[Finding, ...]:
        """The findings that keep it from being open; the first one decides."""
        return tuple(finding for finding in self.findings if finding.cause.verdict is Verdict.STOPS)

    @property
    def decisive(self) -> Finding:
        """The finding that decides about its state."""
        halted = (Cause.EXPOSED_HALTED, Cause.HOP_HALTED, Cause.TARGET_HALTED)
        return next(filter(None, (*self.stops, *map(self.finding, halted))), OPEN)

    @property
    def state(self) -> State:
        return self.decisive.cause.state

    @property
    def cause(self) -> Cause:
        return self.decisive.cause

    @property
    def hops(self) -> tuple[QubeName, ...]:
        """The qubes before the target on its way, the exposed qube first; by nft, all netvms between too."""
        if self.exposed is None:
            return ()
        if self.mode is not Mode.NFT or self.exposed not in self.chain:
            return (self.exposed,)
        return self.chain[self.chain.index(self.exposed) :: -1]

    def finding(self, cause: Cause) -> Finding | None:
        """The first finding of a cause."""
        return next((finding for finding in self.findings if finding.cause is cause), None)

    def with_finding(self, finding: Finding) -> "Forward":
        """The same with one more finding, which may stop it."""
        configs = () if finding.cause.verdict is Verdict.STOPS else self.configs
        return self._replace(findings=(*self.findings, finding), configs=configs)


class Claim(NamedTuple):
    """Ports that a rule claims at a qube.

    ``side`` is None for a listener, which has the port whatever the side. ``is_own``: the qube is the rule's
    target.
    """

    first: int
    last: int
    side: Side | None
    addresses: tuple[IPAddress, ...]
    qube: QubeName
    named: NamedRule
    is_own: bool = False

    def rivals(self, other: "Claim") -> bool:
        """Whether two claims to the same port exclude each other."""
        return (
            not (self.is_own and other.is_own)
            and self.named.rule.proto.overlaps(other.named.rule.proto)
            and (self.side is None or other.side is None or self.side is other.side)
            and _overlap(self.addresses, other.addresses)
        )


def _overlap(some: tuple[IPAddress, ...], others: tuple[IPAddress, ...]) -> bool:
    """Whether two claim one address; a wildcard claims all of its family, and no other."""
    return any(
        a.version == b.version and (a == b or a.is_unspecified or b.is_unspecified)
        for a in some
        for b in others
    )


class Alone(NamedTuple):
    """The result for a rule by itself, apart from all others, and the ports that it claims."""

    forward: Forward
    claims: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All rules in the order of target and name, and what is stored as a rule and cannot be read.

    ``is_held``: nothing of it is live, whatever the rules ask for, until somebody resumes. ``alone`` is each
    rule without all others, and ``basis`` what that depends on besides: the qubes and the targets that are
    called over the stock service; by them another plan is made sooner.
    """

    forwards: tuple[Forward, ...]
    broken: tuple[BrokenRule, ...] = ()
    is_held: bool = False
    alone: Mapping[Key, Alone] = field(default_factory=dict, compare=False, repr=False)
    basis: tuple[Inventory, frozenset[QubeName]] | None = field(default=None, compare=False, repr=False)
    _by_key: Mapping[Key, Forward] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_key", {forward.named.key: forward for forward in self.forwards})

    def __iter__(self) -> Iterator[Forward]:
        return iter(self.forwards)

    @property
    def live(self) -> tuple[Forward, ...]:
        return tuple(forward for forward in self.forwards if forward.is_live)

    def find(self, target: str, name: str) -> Forward | None:
        """One rule; None if there is none of that name, or it cannot be read."""
        return self._by_key.get((QubeName(target), name))

    def held(self) -> "Plan":
        """The same while everything is held: nothing is live."""
        held = Finding(Cause.HELD)
        forwards = tuple(forward.with_finding(held) for forward in self.forwards)
        return replace(self, forwards=forwards, is_held=True)


class NotOpenError(RefusedError):
    """A change was refused: ``finding`` would keep its rule closed, which is planned as ``forward``."""

    def __init__(self, done: str, forward: Forward, finding: Finding) -> None:
        super().__init__(done)
        self.forward = forward
        self.finding = finding
