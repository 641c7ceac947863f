# SPDX-License-Identifier: GPL-2.0-or-later
"""What the firewall of a qube should have of ours in one family, what it has, and how to get there.

In Qubes' table, ``ip qubes`` or ``ip6 qubes``, the chains ``custom-input`` and ``custom-forward`` are the
user's. There we have rules, tagged by their comments, that jump to chains of ours (`Place`); both exist only
while a forward needs them. The jumps come last, so what the user drops stays dropped. A table of our own has
what needs a hook of its own: it changes addresses, counts, and refuses what a forward no longer allows.

A change is one transaction, and never names any other rule, chain or table. All of this is text and values;
`nfttool` applies it.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .rule import Family, Rule

# qubes-core-agent-linux network/qubes-ipv4.nft and qubes-ipv6.nft.
TABLE = "qubes"
CUSTOM_INPUT, CUSTOM_FORWARD = "custom-input", "custom-forward"
# The tables and the chains of ours for forwards by nft, and the tag of the rules that lead there.
OWN = "qubes-fwd-nft"


@dataclass(frozen=True, slots=True)
class Place:
    """A chain of ours in Qubes' table, and when the user's chain leads there."""

    users_chain: str
    chain: str
    tag: str
    when: str

    @property
    def jump(self) -> Rule:
        return Rule(self.tag, f"{self.when} jump {self.chain}")


# Only packets that begin a connection or a flow: the rest passes by Qubes' own rule for established ones
# until the listener or `cutting` ends it; and what belongs to none is dropped as always.
LISTENER = Place(
    CUSTOM_INPUT, "qubes-fwd-qrexec", "qubes-fwd-qrexec", "meta l4proto { tcp, udp } ct state new"
)
FORWARD = Place(CUSTOM_FORWARD, f"{OWN}-forward", OWN, "ct state new ct status dnat")
# All packets from clients, so that the kernel itself ends what is over.
INPUT = Place(CUSTOM_INPUT, f"{OWN}-input", OWN, "ct direction original")
PLACES = (LISTENER, FORWARD, INPUT)

PREROUTING, FORWARDED, ADMITTED, REPLIES = "prerouting", "forward", "admitted", "replies"
ARRIVED, SENT = "input", "output"
GUARD_FORWARD, GUARD_INPUT, GUARD_OUTPUT = "guard-forward", "guard-input", "guard-output"
_GUARDS = (GUARD_FORWARD, GUARD_INPUT, GUARD_OUTPUT)
# The flows of UDP that are held back: addresses and ports as the server's datagrams have them. One stays in
# the set until it has been silent for as long as it takes the kernel to forget a flow.
HELD = "held"
_HELD_S = 180
_HELD_MAX = 65535
# The chains that our own table may have, with type, hook and priority: NAT after Qubes' own, others before.
HOOKS: Mapping[str, tuple[str, str, int] | None] = {
    PREROUTING: ("nat", "prerouting", -90),
    FORWARDED: ("filter", "forward", -10),
    ARRIVED: ("filter", "input", -10),
    SENT: ("filter", "output", -10),
    ADMITTED: None,
    REPLIES: None,
    GUARD_FORWARD: None,
    GUARD_INPUT: None,
    GUARD_OUTPUT: None,
}
# The rules that lead from a hook to other chains, as far as there are those: each packet meets them.
_LEADING = {
    FORWARDED: {
        GUARD_FORWARD: Rule(OWN, f"jump {GUARD_FORWARD}"),
        ADMITTED: Rule(OWN, f"ct status dnat ct direction original jump {ADMITTED}"),
        REPLIES: Rule(OWN, f"ct status dnat ct direction reply jump {REPLIES}"),
    },
    ARRIVED: {GUARD_INPUT: Rule(OWN, f"jump {GUARD_INPUT}")},
    SENT: {GUARD_OUTPUT: Rule(OWN, f"jump {GUARD_OUTPUT}")},
}


@dataclass(frozen=True, slots=True)
class Guard:
    """A rule that keeps what was cut from coming back, in one of the guards' chains, until UNIX seconds."""

    chain: str
    text: str
    until: int

    @property
    def rule(self) -> Rule:
        return Rule(f"until {self.until}", f"meta time < {self.until} {self.text}")


@dataclass(frozen=True, slots=True)
class Content:
    """What there should be of ours.

    ``chains`` are those of our own table, with their rules; ``objects`` are its counters and sets, as nft
    adds them, by kind and name. Guards that are already there stay until they are over, whoever made them.
    """

    placed: Mapping[Place, tuple[Rule, ...]] = field(default_factory=dict)
    chains: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    objects: Mapping[tuple[str, str], str] = field(default_factory=dict)
    guards: tuple[Guard, ...] = ()

    def own(self, guarded: Collection[str]) -> dict[str, tuple[Rule, ...]]:
        """The chains that our own table should have, with their rules but for guards; ``guarded`` are the
        guards' chains that have some. A chain without rules would cost every packet that meets its hook.
        """
        needed = {*guarded, *(chain for chain, rules in self.chains.items() if rules)}
        found = {chain: () if chain in _GUARDS else self._of(chain, needed) for chain in HOOKS}
        return {chain: rules for chain, rules in found.items() if rules or chain in guarded}

    def _of(self, chain: str, needed: Collection[str]) -> tuple[Rule, ...]:
        leading = _LEADING.get(chain, {})
        return (*(rule for to, rule in leading.items() if to in needed), *self.chains.get(chain, ()))

    def at(self, place: Place) -> tuple[Rule, ...]:
        return self.placed.get(place, ())

    @property
    def is_own_needed(self) -> bool:
        return any(self.chains.values())


@dataclass(frozen=True, slots=True)
class SeenRule:
    """A rule that is there; ``jumps_to`` are the chains that it leads to."""

    handle: int
    comment: str
    jumps_to: tuple[str, ...] = ()

    def is_of(self, place: Place) -> bool:
        """Whether it is our rule that leads to a place, in whatever version."""
        return self.comment.partition(" ")[0] == place.tag and place.chain in self.jumps_to


@dataclass(frozen=True, slots=True)
class SeenTable:
    """A table: its chains with their rules; hooks of base chains; counters and sets by kind and name.

    ``has_flags``: it may be asleep, so that none of its chains is asked. ``has_verdict_maps``: it has maps
    with names that may lead to any chain; what is in them is not listed.
    """

    chains: Mapping[str, tuple[SeenRule, ...]] = field(default_factory=dict)
    hooks: Mapping[str, tuple[str, str, int] | None] = field(default_factory=dict)
    objects: frozenset[tuple[str, str]] = frozenset()
    has_flags: bool = False
    has_verdict_maps: bool = False

    def comments(self, chain: str) -> tuple[str, ...]:
        return tuple(rule.comment for rule in self.chains.get(chain, ()))


@dataclass(frozen=True, slots=True)
class Seen:
    """One family: Qubes' table, and ours, None if it is not there."""

    qubes: SeenTable = SeenTable()
    own: SeenTable | None = None

    def has(self, place: Place) -> bool:
        """Whether the firewall has the user's chain for a place."""
        return place.users_chain in self.qubes.chains


def seen(listing: Iterable[dict[str, Any]]) -> SeenTable:
    """A table by the output of ``nft -j list table``."""
    chains: dict[str, list[SeenRule]] = {}
    hooks: dict[str, tuple[str, str, int] | None] = {}
    objects = set()
    has_flags = has_verdict_maps = False
    for entry in listing:
        for kind, value in entry.items():
            if kind == "table":
                has_flags = "flags" in value  # whatever they are: docs/facts.md, F16
            elif kind == "chain":
                chains.setdefault(value["name"], [])
                hook = (value.get("type"), value.get("hook"), value.get("prio"))
                hooks[value["name"]] = hook if "hook" in value else None
            elif kind == "rule":
                found = SeenRule(
                    int(value["handle"]), str(value.get("comment", "")), tuple(_jumps(value.get("expr")))
                )
                chains.setdefault(value["chain"], []).append(found)
            elif kind in ("counter", "set"):
                objects.add((kind, value["name"]))
            elif kind == "map":
                has_verdict_maps = has_verdict_maps or value.get("map") == "verdict"
    found_chains = {name: tuple(rules) for name, rules in chains.items()}
    return SeenTable(found_chains, hooks, frozenset(objects), has_flags, has_verdict_maps)


def _jumps(part: Any) -> Iterator[str]:
    """The chains that a rule leads to, also by a verdict map that is written in it."""
    if isinstance(part, list):
        for one in part:
            yield from _jumps(one)
    elif isinstance(part, dict):
        for verb, value in part.items():
            if verb in ("jump", "goto") and isinstance(value, dict):
                yield str(value.get("target"))
            else:
                yield from _jumps(value)


def transaction(family: Family, wanted: Content, seen: Seen, now_s: float) -> str:
    """The input of ``nft -f -`` that makes everything right, all or nothing; empty if it is right."""
    table, own = f"{family} {TABLE}", f"{family} {OWN}"
    address = "ipv4_addr" if family is Family.IP else "ipv6_addr"
    held = f" {{ type {address} . inet_service . {address} . inet_service; flags dynamic, timeout;"
    held += f" timeout {_HELD_S}s; size {_HELD_MAX}; }}"
    wrong = [chain for chain in (CUSTOM_INPUT, CUSTOM_FORWARD) if not _leads_right(chain, wanted, seen)]
    lines = [
        *(line for chain in wrong for line in _take_jumps(f"{table} {chain}", chain, seen)),
        *_make_own(own, wanted, seen.own, now_s, held),
        *(line for place in PLACES for line in _fill(table, place, wanted.at(place), seen)),
        *(line for chain in wrong for line in _give_jumps(f"{table} {chain}", chain, wanted)),
    ]
    return "".join(f"{line}\n" for line in lines)


def _led(users_chain: str, wanted: Content) -> list[Place]:
    """The places that a chain of the user's should lead to, in their order."""
    return [place for place in PLACES if place.users_chain == users_chain and wanted.at(place)]


def _ours(users_chain: str, seen: Seen) -> list[SeenRule]:
    """Our rules in a chain of the user's."""
    rules = seen.qubes.chains.get(users_chain, ())
    return [rule for rule in rules if any(rule.is_of(place) for place in PLACES)]


def _leads_right(users_chain: str, wanted: Content, seen: Seen) -> bool:
    """Whether the chain has our rules as they should be, all of them behind the user's own."""
    ours = _ours(users_chain, seen)
    last = seen.qubes.chains.get(users_chain, ())[-len(ours) :] if ours else ()
    jumps = [place.jump.comment for place in _led(users_chain, wanted)]
    return [rule.comment for rule in ours] == jumps and list(last) == ours


def _take_jumps(where: str, users_chain: str, seen: Seen) -> Iterator[str]:
    return (f"delete rule {where} handle {rule.handle}" for rule in _ours(users_chain, seen))


def _give_jumps(where: str, users_chain: str, wanted: Content) -> Iterator[str]:
    return (f"add rule {where} {place.jump}" for place in _led(users_chain, wanted))


def _fill(table: str, place: Place, rules: tuple[Rule, ...], seen: Seen) -> Iterator[str]:
    """Make the chain of a place right, or remove it if it should have no rules."""
    is_there = place.chain in seen.qubes.chains
    comments = tuple(rule.comment for rule in rules)
    if rules:
        if not is_there or seen.qubes.comments(place.chain) != comments:
            yield f"add chain {table} {place.chain}"
            yield f"flush chain {table} {place.chain}"
            yield from (f"add rule {table} {place.chain} {rule}" for rule in rules)
    elif is_there:
        is_foreign = seen.qubes.has_verdict_maps or any(
            place.chain in rule.jumps_to and not (chain == place.users_chain and rule.is_of(place))
            for chain, found in seen.qubes.chains.items()
            for rule in found
        )
        if not is_foreign:
            yield f"flush chain {table} {place.chain}"
            yield f"delete chain {table} {place.chain}"
        elif seen.qubes.chains[place.chain]:
            # A rule or a map of somebody else leads there, or may, so it cannot be deleted.
            yield f"flush chain {table} {place.chain}"


def _make_own(table: str, wanted: Content, seen: SeenTable | None, now_s: float, held: str) -> Iterator[str]:
    """Make our own table right, or remove it if neither rules nor guards need it."""
    kept = [] if seen is None else [guard for guard in _guards(seen) if not _is_over(guard[1], now_s)]
    if not (wanted.is_own_needed or wanted.guards or kept):
        if seen is not None:
            yield f"delete table {table}"
        return
    if seen is not None and (
        seen.has_flags or seen.has_verdict_maps or not seen.hooks.items() <= HOOKS.items()
    ):
        yield f"delete table {table}"
        seen, kept = None, []
    if seen is None:
        yield f"add table {table}"
        seen = SeenTable()
    chains = wanted.own({*(guard.chain for guard in wanted.guards), *(chain for chain, _ in kept)})
    for chain in [chain for chain in chains if chain not in seen.chains]:
        yield f"add chain {table} {chain}{_hooked(chain)}"
    objects = {**wanted.objects, ("set", HELD): held}
    for (kind, name), declared in objects.items():
        if (kind, name) not in seen.objects:
            yield f"add {kind} {table} {name}{declared}"
    for chain, rules in chains.items():
        if chain not in _GUARDS and seen.comments(chain) != tuple(rule.comment for rule in rules):
            yield f"flush chain {table} {chain}"
            yield from (f"add rule {table} {chain} {rule}" for rule in rules)
    yield from _make_guards(table, wanted.guards, seen, now_s)
    gone = sorted(seen.chains.keys() - chains.keys())
    yield from (f"flush chain {table} {chain}" for chain in gone)
    yield from (f"delete chain {table} {chain}" for chain in gone)
    for kind, name in sorted(seen.objects - objects.keys()):
        yield f"delete {kind} {table} {name}"


def _hooked(chain: str) -> str:
    if (hook := HOOKS[chain]) is None:
        return ""
    return " {{ type {} hook {} priority {}; policy accept; }}".format(*hook)


def _make_guards(table: str, wanted: tuple[Guard, ...], seen: SeenTable, now_s: float) -> Iterator[str]:
    """Add what is missing and remove what is over. An earlier run may have made some, so none is flushed."""
    there = {(chain, rule.comment) for chain, rule in _guards(seen)}
    for guard in wanted:
        if (guard.chain, guard.rule.comment) not in there:
            yield f"add rule {table} {guard.chain} {guard.rule}"
    for chain, rule in _guards(seen):
        if _is_over(rule, now_s):
            yield f"delete rule {table} {chain} handle {rule.handle}"


def _guards(seen: SeenTable) -> list[tuple[str, SeenRule]]:
    """The rules in the guards' chains, whatever they are."""
    return [(chain, rule) for chain in _GUARDS for rule in seen.chains.get(chain, ())]


def _is_over(guard: SeenRule, now_s: float) -> bool:
    """By its comment; what has none of a guard is over."""
    word, _, rest = guard.comment.partition(" ")
    until = rest.partition(" ")[0]
    return word != "until" or not until.isdecimal() or int(until) <= now_s
