# SPDX-License-Identifier: GPL-2.0-or-later
"""What is in force where that is not what the rules ask for: in qubes' configurations, and in policy."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.apply import Kind, Step
from qubes_fwd_qrexec.admin.states import Config, Forward, Key, Plan
from qubes_fwd_qrexec.common.config import ListenerConfig, parse_key
from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.common.nftconfig import NftConfig, is_nft_key, parse_nft_key
from qubes_fwd_qrexec.common.values import QubeName, RuleName


class Force(Enum):
    """What is in force of a rule: what it asks for; not all of it yet; something else than that; or something
    though it should be closed.
    """

    AS_ASKED = auto()
    NOT_YET = auto()
    OTHERWISE = auto()
    STILL = auto()


@dataclass(slots=True)
class InForce:
    """What is in force of one rule that will not stay. ``ports`` are how many, by the kind of entry: a qube
    of a path by nft has them all again. ``is_anybody``: it lets in anybody.
    """

    force: Force
    ports: dict[str, int] = field(default_factory=dict)
    is_anybody: bool = False


def differing(plan: Plan, due: Iterable[Step]) -> Mapping[Key, InForce]:
    """The rules of which something else is in force than they ask for, those that are gone among them.

    ``due`` are all steps from what is to what the plan asks for.
    """
    live = {forward.named.key: forward for forward in plan.live}
    found: dict[Key, InForce] = {}
    for step in due:
        if step.kind is Kind.OPEN_POLICY:
            lines = frozenset(step.lines)
            for key, forward in live.items():
                if not lines.isdisjoint(policy.lines(forward)):
                    found.setdefault(key, InForce(Force.NOT_YET))
        elif step.tells:
            with suppress(ConfigError):  # an entry that no release of ours has written
                key = parse_nft_key(step.key) if is_nft_key(step.key) else parse_key(step.key)[:2]
                was = found.setdefault(key, InForce(Force.NOT_YET))
                if step.was is not None:
                    was.force = Force.OTHERWISE if key in live else Force.STILL
                    config = _parsed(step.key, step.was)
                    was.ports[step.key] = max(was.ports.get(step.key, 0), _ports(config))
                    was.is_anybody = was.is_anybody or config.sources.anyone
    _add_allowed(found, plan, (line for step in due if step.kind is Kind.CLOSE_POLICY for line in step.lines))
    return found


def _add_allowed(found: dict[Key, InForce], plan: Plan, lines: Iterable[str]) -> None:
    """Add the rules of which dom0's policy still allows calls, though no qube is told of them any more. A
    line says target and ports; where no rule has these, and nothing else explains it, its rule is gone.
    """
    closed: dict[QubeName, list[Forward]] = {}
    for forward in plan:
        if not forward.is_live:
            closed.setdefault(forward.named.target, []).append(forward)
    explained = {key[0] for key, now in found.items() if now.force is not Force.NOT_YET}
    for target, calls in filter(None, map(policy.calls_of, lines)):
        keys = [
            forward.named.key
            for forward in closed.get(target, ())
            if forward.named.rule.target_ports.overlaps(calls.ports)
        ]
        if not keys and target not in explained:
            keys = [(target, RuleName(""))]
        for key in keys:
            found.setdefault(key, InForce(Force.STILL))


def _parsed(entry: str, text: str) -> Config:
    """Raises `ConfigError`."""
    return NftConfig.parse(entry, text) if is_nft_key(entry) else ListenerConfig.parse(entry, text)


def _ports(config: Config) -> int:
    return len(config.listen_ports) * len(config.proto.each)
