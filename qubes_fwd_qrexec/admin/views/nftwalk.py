# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps of diagnose for a forward by nft: qube by qube from the clients to the server.

dom0 sends no packets, so the last word is the counts of the qubes: where they stand still while a client
tries, its packets do not arrive.
"""

from collections.abc import Iterator
from ipaddress import ip_address

from qubes_fwd_qrexec.admin import confirming
from qubes_fwd_qrexec.admin.answers import AnswerError, ask_status
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.confirming import Answer, Lack
from qubes_fwd_qrexec.admin.snapshot import Snapshot
from qubes_fwd_qrexec.admin.states import Cause, Forward, Verdict
from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.nftconfig import NftConfig, Role
from qubes_fwd_qrexec.common.nftreport import Why
from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.values import Proto, QubeName

from . import carried, nftstatus
from .nftstatus import Hop
from .served import NO_SERVER, looks, served
from .tables import Check, counted
from .walking import INSTALL, Remedy, StoppedError, Stops, applied, helps, ok, unknown

_UNIT = "qubes-forward-nft"
_READ_ANEW = f"'systemctl restart {_UNIT}' in {{qube}} reads everything again; its journal there says more"
_SRCHOSTS = "qvm-forward set {target} {name} srchosts=NETWORKS"
_QREXEC = "qvm-forward set {target} {name} mode=qrexec"
_BEYOND = "have it listen at more than loopback addresses, such as at 0.0.0.0 and ::"
REMEDIES: dict[str, Remedy] = {
    Lack.NO_SERVICE: INSTALL,
    Lack.NO_ANSWER: ("{helps}",),
    Lack.NOT_IN_FORCE: (_READ_ANEW,),
    Lack.OTHER_IN_FORCE: (_READ_ANEW,),
    Lack.NO_WORD: (_READ_ANEW,),
    Lack.NO_FAMILY: (
        "restart {qube}, if it got an IPv6 address since it started; or let in networks of the other IP "
        "version alone: {0}",
        _SRCHOSTS,
    ),
    Why.NO_TABLE: (
        "'systemctl restart qubes-iptables' in {qube} loads Qubes' firewall again; if it has no chains "
        "custom-forward and custom-input, update qubes-core-agent in {template}",
    ),
    Why.OVER: ("'sudo qvm-sync-clock' in {qube}, and the same in dom0, set their clocks",),
    Why.FAILED: (f"'systemctl status {_UNIT}' in {{qube}} says why nft refused it",),
}
SERVER: dict[str, Remedy] = {
    NO_SERVER: (f"start the server in {{target}}, and {_BEYOND}",),
    Refusal.LOOPBACK: (f"{_BEYOND}; or send it over qrexec, which gets to 127.0.0.1, too: {{0}}", _QREXEC),
}
# What is left to be tried, where every step is well.
CONCLUSION = (
    "Everything that dom0 can see is as it should be, but dom0 sends no packets itself. Let a client "
    "try, and run this again: packets do not reach the first qube whose counts stay the same."
)
# More clients are not named.
_CLIENTS_MAX = 5


def steps(snapshot: Snapshot, forward: Forward, backend: Backend) -> Iterator[Check]:
    """What each step found, after the rule itself. Raises `StoppedError` at the first that stops."""
    stops = Stops(forward, snapshot.inventory)
    for cause in (Cause.EXPOSED_HALTED, Cause.HOP_HALTED, Cause.TARGET_HALTED):
        if (found := forward.finding(cause)) is not None:
            raise stops.planned("path", found)
    yield ok("path", f"packets go {_path(forward)}")
    yield applied(snapshot, forward, stops)
    yield from _hops(forward, stops, backend)
    if forward.side is Side.VIFS:
        yield unknown("client", _client(snapshot, forward))
    for proto in forward.named.rule.proto.each:
        yield _server(forward, proto, stops, backend)


def _path(forward: Forward) -> str:
    """The qubes, and the address by which each of them is sent to."""
    parts = [f"{forward.exposed} ({forward.side} side)"]
    (target, _), *before = forward.nft_configs
    following = [*(qube for qube, _ in reversed(before[:-1])), target]
    for qube, (_, config) in zip(following, reversed(before), strict=True):
        addresses = (str(address) for address in (config.to4, config.to6) if address is not None)
        parts.append(f"{qube} ({', '.join(addresses)})")
    return " - ".join(parts)


def _hops(forward: Forward, stops: Stops, backend: Backend) -> Iterator[Check]:
    """What each qube of the path says, the exposed qube first."""
    configs = dict(forward.nft_configs)
    answers = confirming.ask_all(backend, [*configs])
    before: Hop | None = None
    for hop in nftstatus.hops(forward, answers):
        config = configs[hop.qube]
        step = "target" if config.role is Role.TARGET else "hop"
        if hop.doubt is not None:
            raise _stopped(hop, step, stops, answers[hop.qube])
        yield _counted(step, hop, config, before)
        before = hop


def _stopped(hop: Hop, step: str, stops: Stops, answer: Answer) -> StoppedError:
    cause = Lack.NOT_IN_FORCE if hop.doubt is None else hop.doubt.lack
    more = helps(hop.qube, answer) if isinstance(answer, AnswerError) else ""
    if isinstance(answer, AnswerError) and answer.status == ExitStatus.TROUBLE and not answer.way_out:
        more = (
            f"restart {hop.qube}, if its service {_UNIT} was switched on after it started; 'systemctl status "
            f"{_UNIT}' there says more"
        )
    return stops.stopped(step, cause, str(hop.reason), REMEDIES[cause], hop.qube, helps=more)


def _counted(step: str, hop: Hop, config: NftConfig, before: Hop | None) -> Check:
    """That a qube has it in force, and how much it has seen of it, which tells where packets get lost."""
    versions = " and ".join(f"IPv{version}" for version in sorted(config.versions))
    text = f"{hop.qube} {'lets in' if config.role is Role.TARGET else 'forwards'} {versions}"
    seen = _seen(hop, config.proto, is_least=config.side is Side.UPLINK and config.role is Role.HOP)
    if seen:
        return ok(step, f"{text}: {seen} so far")
    sent = "" if before is None else _seen(before, config.proto)
    if before is None or not sent:
        return ok(step, f"{text}, and has seen no packets yet")
    lost = f"they got lost before {hop.qube}, unless it was started since"
    return Check(step, Verdict.NOTE, f"{text}, and has seen nothing of the {sent} at {before.qube}: {lost}")


def _seen(hop: Hop, proto: Proto, *, is_least: bool = False) -> str:
    """What a qube has counted; empty for nothing. ``is_least``: what a flowtable speeds up is not counted."""
    if hop.counted is None or not (hop.counted.connections or hop.counted.packets):
        return ""
    packets = f"{'at least ' if is_least else ''}{counted(hop.counted.packets, 'packet')}"
    return f"{carried.live(proto, hop.counted.connections)} and {packets}"


def _client(snapshot: Snapshot, forward: Forward) -> str:
    """What the clients' own rules must allow; dom0 does not read these."""
    exposed, config = forward.nft_configs[-1]
    clients = [
        qube.name
        for qube in snapshot.inventory.qubes.values()
        if qube.netvm == exposed
        and qube.name != forward.named.target
        and _may_come(qube.ip, qube.ip6, config)
    ]
    first = clients[0] if len(clients) == 1 else QubeName("CLIENT")
    named = ", ".join(sorted(clients)[:_CLIENTS_MAX]) + (", ..." if len(clients) > _CLIENTS_MAX else "")
    address = config.to4 or config.to6
    add, ports = f"qvm-firewall {first} add --before=0 accept dsthost={address}", config.target_ports.brief()
    allow = " and ".join(f"'{add} proto={proto} dstports={ports}'" for proto in config.proto.each)
    return (
        f"the firewall rules of a client itself ({named or 'no qube may come'}) are not checked: "
        f"'qvm-firewall {first} list' shows them, and it is let out by {allow}"
    )


def _may_come(ip: str | None, ip6: str | None, config: NftConfig) -> bool:
    addresses = (ip_address(text) for text in (ip, ip6) if text is not None)
    return any(address.version in config.versions and address in config.sources for address in addresses)


def _server(forward: Forward, proto: Proto, stops: Stops, backend: Backend) -> Check:
    """Whether a server listens where packets get, as the target says."""
    target = forward.named.target
    argument = f"{proto}.{forward.named.rule.target_ports.first}"  # of a range it stands for all
    try:
        trial = ask_status(backend, target, argument).trial
    except AnswerError as error:
        text = f"whether a server listens on more than 127.0.0.1 is not known: {error}"
        return unknown("server", f"{text}; {looks(proto, target)}")
    return served(target, proto, trial, stops, SERVER)
