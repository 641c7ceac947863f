# SPDX-License-Identifier: GPL-2.0-or-later
"""The words for findings: why a forward is as it is, and the commands that would change it.

Each row has the sentence of a cause and its ways out. Both name facts in braces, and the sentence names the
ways out by number. In a way out, QUBE, NETVM, PORTS and NETWORKS are for the user to fill in.
"""

from collections.abc import Mapping
from itertools import takewhile

from qubes_fwd_qrexec.admin.checks import CALL_PORTS_MAX
from qubes_fwd_qrexec.admin.inventory import ADMIN, DISPOSABLE, NFT_FEATURE, QREXEC_FEATURE, REMOTE, TEMPLATE
from qubes_fwd_qrexec.admin.states import Cause, Finding, Forward, NotOpenError, State, Verdict
from qubes_fwd_qrexec.common.config import Service
from qubes_fwd_qrexec.common.errors import why
from qubes_fwd_qrexec.common.nftconfig import SHIFTED_MAX
from qubes_fwd_qrexec.common.rules import Mode
from qubes_fwd_qrexec.common.services import NFT_SERVICE
from qubes_fwd_qrexec.common.values import QubeName, yes_no

from . import carried, entrance

Command = tuple[str, ...]
HELD = "Everything is held by 'qvm-forward panic': nothing opens until 'qvm-forward resume'"

_SET, _REMOVE = "qvm-forward set {target} {name} ", "qvm-forward remove {target} {name}"
_CONFIRM = "qvm-forward confirm {target} {name}"
_VIA, _BYPASS = _SET + "via=QUBE", _SET + "bypass-tunnel=yes"
_OR_BYPASS = ", or accept that with bypass-tunnel=yes (--bypass-tunnel)."
_BYPASSES = "{target} {is_tunneled}, and listening at {qube} would bypass it; "
_ASKS = "The rule asks for {case}, but {lacks}; {install}, or leave {case} out."
_FORWARD, _CONNECT = Service.FORWARD_TCP, Service.CONNECT_TCP
_QREXEC, _NFT = _SET + "mode=qrexec", _SET + "mode=nft"
_OR_QREXEC = ", or send it over qrexec with mode=qrexec."
_NEEDED = "which mode=nft needs at every qube of the path"

ROWS: dict[Cause | tuple[Cause, str], Command] = {
    Cause.OPEN: ("{what} to {ports} of {exposed}{where} from {who} reach {target_ports} of {target}.",),
    (Cause.EXPOSED_HALTED, Mode.QREXEC): (
        "{qube} is halted and will listen when it starts: '{0}'.",
        "qvm-start {qube}",
    ),
    (Cause.EXPOSED_HALTED, Mode.NFT): (
        "{qube} is halted and will forward when it starts: '{0}'.",
        "qvm-start {qube}",
    ),
    Cause.HOP_HALTED: ("{qube}, which is on the path, is halted: '{0}'.", "qvm-start {qube}"),
    (Cause.TARGET_HALTED, Mode.NFT): (
        "{qube} is halted, and nobody answers until it runs: '{0}'.",
        "qvm-start {qube}",
    ),
    (Cause.TARGET_HALTED, Mode.QREXEC): (
        "{qube} is halted, and nobody is answered until it runs: '{0}', or let {traffic} start it with "
        "autostart=yes.",
        "qvm-start {qube}",
        _SET + "autostart=yes",
    ),
    Cause.DISABLED: ("'{0}' opens it again.", "qvm-forward enable {target} {name}"),
    Cause.EXPIRED: ("It has expired; '{0}' extends it, '{1}' removes it.", _SET + "expire=+8h", _REMOVE),
    Cause.HELD: (f"{HELD}.", "qvm-forward resume"),
    Cause.UNREADABLE_QUBE: (
        "Nothing opens while something about its qubes is unknown: {detail}.",
        "qvm-forward apply",
    ),
    (Cause.NO_SUCH_QUBE, "target"): ("There is no qube {qube}; name one that 'qvm-ls' shows.", _REMOVE),
    (Cause.NO_SUCH_QUBE, "exposed"): (
        "There is no qube {qube} to listen; name another one with via=QUBE.",
        _VIA,
    ),
    (Cause.UNFIT_QUBE, "target"): (
        "{qube} {is_unfit} be the target of a forward; name the qube that runs the service.",
        _REMOVE,
    ),
    (Cause.UNFIT_QUBE, "exposed"): ("{qube} {is_unfit} listen; name another qube with via=QUBE.", _VIA),
    (Cause.UNFIT_QUBE, "itself"): (
        "{qube} cannot listen for itself, as qrexec connects two different qubes; name another qube with "
        "via=QUBE.",
        _VIA,
    ),
    Cause.CLONED: ("{whose}; '{0}' makes it a rule of {target}, '{1}' removes it.", _CONFIRM, _REMOVE),
    Cause.NETVM_BROKEN: ("{detail}.", "qvm-prefs {qube} netvm NETVM"),
    Cause.NETVM_CHANGED: (
        "{moved}; '{0}' agrees to the new path{moves}, and with follow-netvm=yes the rule follows every "
        "change.",
        _CONFIRM,
        _SET + "follow-netvm=yes",
    ),
    (Cause.NO_NETVM, Mode.NFT): (
        "{target} has no netvm, so no packets reach it; give it one with '{0}'" + _OR_QREXEC,
        "qvm-prefs {target} netvm NETVM",
        _QREXEC,
    ),
    (Cause.NO_NETVM, Mode.QREXEC): (
        "{target} has no netvm that could listen for it; name the qube that should listen with via=QUBE "
        "(--via QUBE).",
        _VIA,
    ),
    Cause.NO_IP_PATH: (
        "{qube} is not a netvm of {target}, and mode=nft follows its netvms; leave out via" + _OR_QREXEC,
        _SET + "via=",
        _QREXEC,
    ),
    Cause.NFT_BEHIND_TUNNEL: (
        "{target} {is_tunneled}, and mode=nft sends no packets past a tunnel" + _OR_QREXEC,
        _QREXEC,
        _SET + "bypass-tunnel=no",
    ),
    Cause.NO_NFT_SERVICE: (f"{{lacks}}, {_NEEDED}; {{install}}" + _OR_QREXEC, _QREXEC, _REMOVE),
    Cause.NFT_SWITCHED_OFF: (
        f"{{qube}} has the service qubes-forward-nft switched off, {_NEEDED}; '{{0}}' switches it on when "
        "{qube} starts again" + _OR_QREXEC,
        f"qvm-service {{qube}} {NFT_FEATURE.removeprefix('service.')} on",
        _QREXEC,
    ),
    Cause.NFT_AT_WHONIX: (
        "Whonix runs in {qube} ({mark.mark}), and its own firewall, which replaces that of Qubes, refuses "
        "what is forwarded; send nothing to it by nft" + _OR_QREXEC,
        _QREXEC,
        _REMOVE,
    ),
    Cause.NO_ADDRESS: (
        "{qube} has no IPv{number} address, so IPv{number} does not reach {target}; leave out IPv{number} "
        "networks" + _OR_QREXEC,
        _SET + "srchosts=NETWORKS",
        _QREXEC,
    ),
    Cause.LINK_LOCAL: (
        "Addresses in {detail} are link-local, and packets from them cannot be forwarded; let in other "
        "networks" + _OR_QREXEC,
        _SET + "srchosts=NETWORKS",
        _QREXEC,
    ),
    Cause.NFT_LOOPBACK: (
        "Packets to a loopback address are not forwarded; take another listen address" + _OR_QREXEC,
        _SET + "listen=ADDRESS",
        _QREXEC,
    ),
    (Cause.NO_SERVICE, "system"): (
        f"{{target}} runs {{detail}}, which has neither {_FORWARD} nor {_CONNECT}; name a target that runs "
        "Linux.",
        _REMOVE,
    ),
    (Cause.NO_SERVICE, "udp-system"): (
        f"{{target}} runs {{detail}}, which has no {Service.FORWARD_UDP}; name a target that runs Linux.",
        _REMOVE,
    ),
    (Cause.NO_SERVICE, "udp"): (
        "{lacks}, without which no UDP gets there over qrexec; {install}, or send it by nft with mode=nft.",
        _NFT,
        _REMOVE,
    ),
    (Cause.NO_SERVICE, "transport=mux"): (_ASKS, _SET + "transport=auto"),
    (Cause.NO_SERVICE, "proxy"): (_ASKS, _SET + "proxy=off"),
    (Cause.TUNNEL, "beside"): (
        "{target} {is_tunneled}, and {qube} has no netvm: nothing tells its tunnel from the LAN beside it, "
        "which would bypass the tunnel. Expose it to qubes alone with forwardtype=internal (--internal)"
        + _OR_BYPASS,
        _SET + "forwardtype=internal",
        _BYPASS,
    ),
    (Cause.TUNNEL, "at"): (
        _BYPASSES + "expose it at {tunnel} with via={tunnel} (--via {tunnel})" + _OR_BYPASS,
        _SET + "via={tunnel}",
        _BYPASS,
    ),
    (Cause.TUNNEL, "behind"): (
        _BYPASSES + "expose it at a qube behind it with via=QUBE (--via QUBE)" + _OR_BYPASS,
        _VIA,
        _BYPASS,
    ),
    (Cause.TUNNEL, "nowhere"): (_BYPASSES + "do not expose it" + _OR_BYPASS, _BYPASS),
    (Cause.CONFLICT, "port"): (
        "Rule {rival} already has {rival_ports} of {qube}; choose another port or listen address, or "
        "remove or disable that rule.",
        _SET + "srcports=PORTS",
        "qvm-forward disable {rival}",
    ),
    (Cause.CONFLICT, "own-port"): (
        "Rule {rival} already has {rival_ports} of {qube}, and would get what is meant for {target} "
        "itself; let the server there listen at another port, or remove or disable that rule.",
        _SET + "dstports=PORTS",
        "qvm-forward disable {rival}",
    ),
    (Cause.CONFLICT, "autostart"): (
        "Rule {rival} reaches the same port of {target} from {qube} with a different autostart, and dom0's "
        "policy cannot tell the two apart; give both the same autostart.",
        _SET + "autostart={rival_autostart}",
    ),
    (Cause.TOO_LARGE, "ports"): (
        "With one call for each connection every port needs its own policy line, and {number} ports are "
        f"more than {CALL_PORTS_MAX}; make the range shorter, or {{shorten}}.",
        _SET + "srcports=PORTS",
    ),
    (Cause.TOO_LARGE, "shifted"): (
        f"mode=nft can move a range of up to {SHIFTED_MAX:,} ports to other ports, and this one has "
        "{number:,}; expose the same ports that the target uses" + _OR_QREXEC,
        _SET + "srcports=PORTS",
        _QREXEC,
    ),
    (Cause.TOO_LARGE, "bytes"): ("{detail}.", _SET + "srchosts=NETWORKS"),
    (Cause.SOURCE_ELSEWHERE, "netvm"): (
        "{qube} cannot reach {exposed}, as its netvm is {detail}: expose the forward there with "
        "via={detail} (--via {detail}), or change the netvm of {qube} with '{1}'.",
        _SET + "via={detail}",
        "qvm-prefs {qube} netvm {exposed}",
    ),
    (Cause.SOURCE_ELSEWHERE, "none"): (
        "{qube} cannot reach {exposed}, which is not its netvm: change that with '{0}', or name other qubes.",
        "qvm-prefs {qube} netvm {exposed}",
        _SET + "srchosts=QUBE",
    ),
    Cause.NO_SOURCE: (
        "Nobody may connect, as none of the qubes that the rule names is left; name another one that has "
        "{exposed} as its netvm.",
        _SET + "srchosts=QUBE",
        _REMOVE,
    ),
    (Cause.SOURCE_NOBODY, "qube"): ("nobody is let in for {qube}, as there is no such qube",),
    (Cause.SOURCE_NOBODY, "address"): (
        "nobody is let in for {qube}, as it has no address of the IP version of this forward",
    ),
    (Cause.SOURCE_NOBODY, "shared"): (
        "nobody is let in for {qube} by an address that {detail} has too: change that with '{0}'",
        "qvm-prefs {qube} ip ADDRESS",
    ),
    Cause.TAG_ELSEWHERE: ("@tag:{case} does not let in {detail}, whose netvm is not {qube}",),
    Cause.SOURCE_NETVM: ("whoever is behind {qube} has its address, and is let in too",),
    Cause.ANYBODY: ("anybody who can reach the port may connect",),
    Cause.NO_OWNER: ("no owner recorded, so clones would be open too: '{0}'", _CONFIRM),
    Cause.NO_PATH: ("no path recorded, so it stays open when the netvm changes: '{0}'", _CONFIRM),
    Cause.NO_DISPOSABLES: (
        "it opens {target} itself, not the disposables based on it, each of which needs a rule of its own",
    ),
    Cause.IPV4_ALONE: ("IPv4 alone, as {qube} has no IPv6 address",),
    Cause.BYPASSES_TUNNEL: ("bypasses the tunnel {mark}",),
    Cause.PERHAPS_TUNNEL: (
        "nothing says whether {qube}, which is on the path, is a tunnel: if it runs a VPN or Tor, mark it "
        "with '{0}', so that no forward bypasses it",
        "qvm-forward tunnel mark {qube}",
    ),
    Cause.STOCK_SERVICE: (
        f"{{lacks}}, so each connection goes over the stock {_CONNECT}: if the server closes its side "
        "first, the rest of what the client sends is lost. To fix that, {install}",
    ),
}
_UNFIT = {
    ADMIN: "is the administrative qube and must not",
    TEMPLATE: "is a template and must not",
    REMOTE: "is a qube of another machine and cannot",
    QREXEC_FEATURE: f"has no qrexec (feature {QREXEC_FEATURE}) and cannot",
}
_NOTES = {Cause.NO_OWNER, Cause.NO_PATH, Cause.NO_DISPOSABLES, Cause.BYPASSES_TUNNEL}
_NOTES |= {Cause.SOURCE_NOBODY, Cause.TAG_ELSEWHERE, Cause.SOURCE_NETVM}
_HINTS = {Cause.PERHAPS_TUNNEL, Cause.IPV4_ALONE}


def sentence(forward: Forward, finding: Finding | None = None) -> str:
    """What a forward opens, or why it does not and what to do; or what else was found about it."""
    return _said(forward, finding or forward.decisive)[0]


def ways_out(forward: Forward, finding: Finding | None = None) -> tuple[Command, ...]:
    """The commands by which a forward leaves its state; if it takes more than one, in their order."""
    return _said(forward, finding or forward.decisive)[1]


def notes(forward: Forward) -> tuple[str, ...]:
    """Labels that every listing repeats."""
    return _before_it_stops(forward, _NOTES)


def hints(forward: Forward) -> tuple[str, ...]:
    """What is said once, when a forward is made."""
    return _before_it_stops(forward, _HINTS)


def _before_it_stops(forward: Forward, causes: set[Cause]) -> tuple[str, ...]:
    found = takewhile(lambda finding: finding.cause.verdict is not Verdict.STOPS, forward.findings)
    return tuple(sentence(forward, finding) for finding in found if finding.cause in causes)


def error_text(error: Exception) -> str:
    """What an error says; of a refused change, why it was not made and what to do."""
    if isinstance(error, NotOpenError):
        return f"{error}. {sentence(error.forward, error.finding)}"
    if isinstance(error, OSError):
        return f"{error.filename}: {why(error)}" if error.filename else why(error)
    return str(error)


def filled(template: str, forward: Forward, finding: Finding) -> str:
    """A text with the facts of a finding filled in for their names in braces."""
    return template.format(**_facts(forward, finding))


def _next_stop(forward: Forward) -> Finding | None:
    """What would stop a forward after its new netvms were agreed to, apart from ports."""
    stops = (stop for stop in forward.stops if stop.cause.state is State.REFUSED)
    return next((stop for stop in stops if stop.cause is not Cause.CONFLICT), None)


def _said(forward: Forward, finding: Finding) -> tuple[str, tuple[Command, ...]]:
    """The sentence and the ways out."""
    facts = _facts(forward, finding)
    more = _next_stop(forward) if finding.cause is Cause.NETVM_CHANGED else None
    if more is not None:
        first, ways = _said(forward, more)
        confirm = _command(_CONFIRM, facts)
        text = f"{facts['moved']}, where it would be {more.cause.state}. {first} After that "
        return f"{text}'{' '.join(confirm)}' agrees to the new path.", (*ways, confirm)
    text, *templates = ROWS.get(finding.cause) or ROWS[finding.cause, finding.case]
    commands = tuple(_command(template, facts) for template in templates)
    return text.format(*map(" ".join, commands), **facts), commands


def _command(template: str, facts: Mapping[str, object]) -> Command:
    # No fact in a command has spaces but the name of a rule, which is two words.
    return tuple(template.format(**facts).split())


def _facts(forward: Forward, finding: Finding) -> dict[str, object]:
    """What the rows name: about the rule first, then about the finding."""
    rule, target = forward.named.rule, forward.named.target
    traffic = carried.traffic(rule.proto)
    facts: dict[str, object] = {
        "target": target,
        "name": forward.named.name,
        "exposed": forward.exposed,
        "ports": rule.listen_ports.worded(),
        "target_ports": rule.target_ports.worded(),
        "traffic": traffic,
        "qube": finding.qube,
        "number": finding.number,
        "case": finding.case,
        "detail": finding.detail,
    }
    if finding.cause is Cause.OPEN:
        facts["what"] = f"{traffic[0].upper()}{traffic[1:]}"
        facts["where"] = entrance.where(forward)
        facts["who"] = "anybody who can reach it" if rule.sources.anyone else ", ".join(entrance.asked(rule))
    elif finding.cause is Cause.UNFIT_QUBE:
        facts["is_unfit"] = _UNFIT.get(finding.detail)
    elif finding.cause is Cause.CLONED:
        facts["whose"] = _whose(forward, finding)
    elif finding.cause is Cause.NETVM_CHANGED:
        were, are = (" - ".join(path) or "none" for path in (rule.path or (), forward.chain))
        facts["moved"] = f"The netvms of {target} were {were} when the rule was agreed to and are {are} now"
        was = entrance.entrance(finding.qube, finding.side)
        now = entrance.entrance(forward.exposed, forward.side)
        facts["moves"] = f", which opens it at {now} and no longer at {was}" if was != now else ""
    elif finding.cause in (Cause.NO_SERVICE, Cause.STOCK_SERVICE):
        service = Service.FORWARD_UDP if finding.case == "udp" else _FORWARD
        facts["lacks"], facts["install"] = _lacks(target, finding, service)
    elif finding.cause is Cause.NO_NFT_SERVICE and finding.qube is not None:
        installed_in = finding._replace(qube=QubeName(finding.detail), detail=finding.case)
        facts["lacks"], facts["install"] = _lacks(finding.qube, installed_in, NFT_SERVICE)
    elif finding.cause is Cause.TOO_LARGE:
        stock = forward.finding(Cause.STOCK_SERVICE)
        facts["shorten"] = "use transport=mux" if stock is None else _lacks(target, stock)[1]
    if (mark := finding.mark) is not None:
        is_itself = mark.qube == target and not mark.is_behind
        itself, behind = f"is a tunnel itself ({mark.mark})", f"is behind a tunnel, marked at {mark}"
        facts |= {"mark": mark, "tunnel": mark.qube, "is_tunneled": itself if is_itself else behind}
    if (rival := finding.rival) is not None:
        at_target = finding.qube == rival.target
        ports = rival.rule.target_ports if at_target else rival.rule.listen_ports
        facts |= {"rival": rival, "rival_ports": ports.worded()}
        facts["rival_autostart"] = yes_no(rival.rule.autostart)
    return facts


def _whose(forward: Forward, finding: Finding) -> str:
    owner, target = forward.named.rule.owner, forward.named.target
    if owner is None:
        return f"The rule does not say for which qube it was made, and {target} is a disposable"
    if finding.detail == DISPOSABLE:
        return f"The rule was made for {owner}, and {target} is a disposable that inherited it"
    return f"The rule was made for {owner} and came to {target} by cloning or renaming"


def _lacks(target: QubeName, finding: Finding, service: str = _FORWARD) -> tuple[str, str]:
    """What a qube lacks, and how to get it."""
    lacks = f"{target} does not offer {service}"
    if finding.detail == "older":
        return f"{target} was started before its template offered {service}", f"restart {target}"
    if finding.detail not in ("", "update"):
        return lacks, f"use a qube that runs Linux, as {target} runs {finding.detail}"
    install = f"{finding.detail or 'install'} qubes-fwd-qrexec in "
    if finding.qube == target:
        return lacks, install + target
    return lacks, f"{install}its template {finding.qube} and restart {target}"
