# SPDX-License-Identifier: GPL-2.0-or-later
"""The command diagnose: the whole way of a forward, from its rule to the server, up to the first fault.

Each step looks at one thing. A qube's own answers are not the last word: the last step sends a connection
all the way.
"""

from argparse import Namespace
from collections.abc import Iterator
from enum import StrEnum

from qubes_fwd_qrexec.admin.answers import AnswerError, ask_status
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.snapshot import Snapshot
from qubes_fwd_qrexec.admin.states import Cause, Forward, State, Verdict
from qubes_fwd_qrexec.common.config import ListenerConfig, Service
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.report import Answer, Firewall, FirewallReport, QubeReport, Trial
from qubes_fwd_qrexec.common.rules import BrokenRule, Mode, NamedRule, Proxy
from qubes_fwd_qrexec.common.services import STATUS_SERVICE
from qubes_fwd_qrexec.common.values import Proto, QubeName

from . import carried, entrance, nftwalk
from .judged import judged
from .listeners import Has, uptakes
from .render import broken_line
from .served import NO_SERVER, elsewhere, misled, served
from .session import Session
from .tables import Check, Style, checks, escaped
from .walking import INSTALL, StoppedError, Stops, applied, helps, ok, unknown

# The unit of the listener, and the Qubes service that starts it.
LISTENER = "qubes-forward-listener"
# A trial sends the server no data, so it cannot tell whether server and clients speak the same protocol.
_WELL = "Everything on the way to the server works. Whether the server answers its clients was not tested."


class Fault(StrEnum):
    """What is wrong where a step stops, in a word for programs. There are also those of the plan's `Cause`,
    of `Has`, and of the round trip's `Refusal`.
    """

    CLOSED = "firewall-closed"
    DENIED = "denied"


_SET = "qvm-forward set {target} {name} "
_LOG = f"'journalctl -u {LISTENER}' in {{exposed}}"
_FIREWALL_LOG = "'systemctl status qubes-forward-nft' in {exposed} says why"
_PORT = (
    "fix that in {exposed}, or choose another port or address: {0}, or {1}",
    *(f"{_SET}srcports=PORT", f"{_SET}listen=ADDRESS"),
)
_START = "start the server in {{target}}, and have it listen on 127.0.0.1; 'ss -{}' there shows who listens"
_UPDATE = "; an older qubes-fwd-qrexec there may not know UDP: update it"
# What helps against each, and then the commands that it names by number.
REMEDIES: dict[str, tuple[str, ...]] = {
    Has.NO_SERVICE: INSTALL,  # `Refusal.NO_SERVICE` is the same word
    Has.NO_ANSWER: ("{helps}",),
    Has.NO_LISTENER: (
        f"{{0}} and start {{exposed}} again; if it is on, 'systemctl status {LISTENER}' in {{exposed}} says "
        "why it does not run",
        f"qvm-service {{exposed}} {LISTENER} on",
    ),
    Has.FAILED: _PORT,
    Has.IN_PART: _PORT,
    Has.NOT_YET: (f"{_LOG} says why; 'systemctl restart {LISTENER}' there reads everything again{{helps}}",),
    Has.FIREWALL: (_FIREWALL_LOG,),
    Fault.CLOSED: (_FIREWALL_LOG,),
    Fault.DENIED: (
        "look for a line in a policy file that sorts before 30-forward.policy, or for a file that cannot be "
        "read: {0}",
        "qubes-policy-lint",
    ),
    NO_SERVER: (_START.format("ltn"),),
    Refusal.POLICY: (
        "'journalctl -u qubes-qrexec-policy-daemon' in dom0 says why the call was refused; {target} may "
        "also have reached its limit of calls",
    ),
    Refusal.SERVER: ("the server in {target} accepted no connection; see its log",),
    # With the stock service this is also how a server that does not listen looks.
    Refusal.NO_CALL: (
        f"make sure that the server in {{target}} is running and listens on 127.0.0.1; {_LOG} says why "
        "calls fail",
    ),
    Refusal.BUSY: ("wait until some connections to {target} have ended",),
}
_OTHERWISE = (f"{_LOG}, and the journal of {{target}}, say more",)
_FIREWALL = {
    Firewall.OPEN: "lets clients in over",
    Firewall.CLOSED: "drops what comes over",
    Firewall.UNKNOWN: "does not say whether it lets clients in over",
}


_KEYS = ("step", "verdict", "text", "cause", "remedy", "ways_out")


def diagnose(args: Namespace, session: Session) -> int:
    """Walk the way; exit status 0 if nothing on it is wrong."""
    snapshot = session.look(with_config=True)
    entry = snapshot.find(args.qube, args.name)
    found = list(walk(snapshot, entry, session.now, session.backend))
    is_well = found[-1].verdict != Verdict.STOPS
    if session.is_json:
        steps = [dict(zip(_KEYS, check, strict=True)) for check in found]
        session.say_json({"qube": entry.target, "name": entry.name, "is_well": is_well, "steps": steps})
    else:
        last = conclusion(found[-1], snapshot.plan(session.now).find(entry.target, entry.name))
        session.say(f"{checks(found, session.style)}{last}\n")
    return 0 if is_well else 1


def conclusion(last: Check, forward: Forward | None) -> str:
    """What follows from a walk whose ``last`` step this is: what helps, or what is left to be tried."""
    if last.remedy:
        return f"What helps: {escaped(last.remedy)}"
    return _WELL if forward is None or forward.mode is not Mode.NFT else nftwalk.CONCLUSION


def walk(snapshot: Snapshot, entry: NamedRule | BrokenRule, now: float, backend: Backend) -> Iterator[Check]:
    """What each step found, up to the first that stops. Each asks what it needs when it is taken."""
    if isinstance(entry, BrokenRule):
        remove = ("qvm-forward", "remove", entry.target, entry.name)
        problem = broken_line(entry, Style()).rstrip("\n")
        yield Check("rule", Verdict.STOPS, problem, State.BROKEN, f"'{' '.join(remove)}'", (remove,))
        return
    forward = next(forward for forward in snapshot.plan(now) if forward.named == entry)
    try:
        yield from _Walk(snapshot, forward, backend).steps()
    except StoppedError as stopped:
        yield stopped.check


class _Walk:
    """The steps for one forward, in their order, up to the first `StoppedError`."""

    def __init__(self, snapshot: Snapshot, forward: Forward, backend: Backend) -> None:
        self._snapshot = snapshot
        self._forward = forward
        self._backend = backend
        self._stops = Stops(forward, snapshot.inventory)
        self._target = snapshot.inventory.qubes[forward.named.target]

    def steps(self) -> Iterator[Check]:
        forward = self._forward
        if forward.exposed is None or not forward.is_live:
            raise self._stops.planned("rule", forward.decisive)
        yield ok("rule", f"{forward.named} is {forward.state}")
        if forward.named.rule.sources.has_names:
            yield ok("sources", f"{entrance.let_in(forward)} may connect")
        if not forward.listener_configs:
            yield from nftwalk.steps(self._snapshot, forward, self._backend)
            return
        yield from self._at_exposed(forward.exposed)
        yield from self._at_target()
        if self._target.is_running:
            for config in forward.listener_configs:
                yield self._round_trip(forward.exposed, config)
                if config.service is Service.FORWARD_TCP:
                    yield from self._header(config)

    def _at_exposed(self, exposed: QubeName) -> Iterator[Check]:
        halted = self._forward.finding(Cause.EXPOSED_HALTED)
        if halted is not None:
            raise self._stops.planned("exposed qube", halted)
        yield ok("exposed qube", f"{exposed} is running")

        yield applied(self._snapshot, self._forward, self._stops)
        answer = self._ask("listener", exposed)
        ports = self._forward.named.rule.listen_ports.worded()
        for found in (took := uptakes(self._forward, answer)):
            if found.is_shut and found.has is not Has.FIREWALL:
                more = _UPDATE if found.proto is Proto.UDP and found.has is Has.NOT_YET else ""
                raise self._stopped("listener", found.has, found.said, helps=more)
            yield ok("listener", f"{exposed} listens on {carried.named(found.proto)}{ports}")
        for found in took:
            if found.is_shut:
                raise self._stopped("firewall", found.has, found.said)
        yield self._firewall(exposed, self._forward.listener_configs[0], answer.firewall)

        verdicts = judged([self._forward], self._backend, self._snapshot.installed)
        verdict = verdicts[self._forward.named.key]
        services = " and ".join(config.service for config in self._forward.listener_configs)
        call = f"{services} from {exposed} to {self._target.name}"
        if verdict.is_allowed:
            yield ok("policy", f"dom0 allows {call}")
        elif verdict.is_allowed is None:
            yield unknown("policy", verdict.reason)
        else:
            raise self._stopped("policy", Fault.DENIED, f"dom0 denies {call}: {verdict.reason}")

    def _firewall(self, exposed: QubeName, config: ListenerConfig, told: FirewallReport) -> Check:
        """The firewall, for the IP versions that the forward listens on and its clients have."""
        listened = {address.version for address in config.listen}
        versions = sorted(listened & config.sources.versions or listened)
        words = {f"IPv{version}": told.ip if version == 4 else told.ip6 for version in versions}
        detail = ", ".join(
            f"{does} {' and '.join(names)}"
            for word, does in _FIREWALL.items()
            if (names := [name for name in words if words[name] is word])
        )
        text = f"the firewall of {exposed} {detail}"
        if set(words.values()) == {Firewall.CLOSED}:
            raise self._stopped("firewall", Fault.CLOSED, text)
        # The client chooses the IP version: one that is open does not make up for one that is closed.
        return (ok if set(words.values()) == {Firewall.OPEN} else unknown)("firewall", text)

    def _at_target(self) -> Iterator[Check]:
        """The target itself, as the plan only knows what its template offers."""
        name, configs = self._target.name, self._forward.listener_configs
        halted = self._forward.finding(Cause.TARGET_HALTED)
        if halted is not None:
            raise self._stops.planned("target", halted)
        unasked = unknown("service", f"{name} was not asked whether it has {configs[0].service}")
        if not self._target.is_running:
            yield unknown("target", f"{name} is halted, and a client starts it")
            yield unasked
            return
        yield ok("target", f"{name} is running")
        port, is_asked = configs[0].target_ports.first, False  # of a range it stands for all
        for config in configs:
            if config.service is Service.CONNECT_TCP:
                yield unasked
                yield unknown("server", f"{name} was not asked whether a server listens")
                continue
            is_udp = config.proto is Proto.UDP
            trial = self._ask("service", name, f"{config.proto}.{port}" if is_udp else str(port)).trial
            if not is_asked:
                yield ok("service", f"{name} has qubes-fwd-qrexec, and answers")
            is_asked = True
            if is_udp:
                remedies = {NO_SERVER: (_START.format("lun"),), **elsewhere(Proto.UDP, port)}
                yield served(name, config.proto, trial, self._stops, remedies)
            else:
                yield self._server(name, port, trial)

    def _server(self, name: QubeName, port: int, trial: Trial | None) -> Check:
        """Whether a server takes connections, as a target says that has tried."""
        if trial is None:
            return unknown("server", f"{name} does not say whether a server listens")
        if trial.answer is Answer.THROUGH:
            text = f"a server in {name} accepts connections on port {port}"
            return ok("server", text if trial.reason != Refusal.ELSEWHERE else f"in {name}, {trial.text}")
        remedies = elsewhere(Proto.TCP, port)
        if trial.reason in remedies:
            text = f"no server in {name} accepts connections where calls arrive: {trial.text}"
            raise self._stops.stopped("server", trial.reason, text, remedies[trial.reason])
        text = f"no server in {name} accepts connections on port {port} of 127.0.0.1 or ::1: {trial.text}"
        raise self._stopped("server", NO_SERVER, text)

    def _round_trip(self, exposed: QubeName, config: ListenerConfig) -> Check:
        trial = self._ask("round trip", exposed, config.key).trial
        is_udp = config.proto is Proto.UDP
        what, end = ("a call for UDP", self._target.name) if is_udp else ("a connection", "the server")
        if trial is None or trial.answer is Answer.SILENT:
            text = f"{what} from {exposed} got no answer"
            return unknown("round trip", text if trial is None else f"{text}: {trial.text}")
        if trial.answer is not Answer.THROUGH:
            text = f"{what} from {exposed} did not reach {end}: {trial.text}"
            raise self._stopped("round trip", trial.reason, text, self._target.name)
        if is_udp:
            nobody = "no packet was sent, so only a client can tell whether the server answers"
            return ok("round trip", f"{what} from {exposed} reached {end}; {nobody}")
        # A server that expects something else refuses it, and nobody here sees that.
        proxy = self._forward.named.rule.proxy
        header = f"with a PROXY header of version {proxy.removeprefix('v')} (proxy=off sends none)"
        if proxy is Proxy.OFF:
            which = "proxy=v1 or proxy=v2" if self._forward.named.rule.proto is Proto.TCP else "proxy=v2"
            header = f"without a PROXY header (if the server expects one, set {which})"
        return ok("round trip", f"a connection from {exposed} reached the server, {header}")

    def _header(self, config: ListenerConfig) -> Iterator[Check]:
        """Whether the server seems to expect another header than it gets."""
        try:
            answer = ask_status(self._backend, self._target.name, f"proxy.{config.target_ports.first}")
        except AnswerError:  # a target that is older than dom0
            return
        yield from misled(self._forward, answer.trial, self._stops)

    def _ask(self, step: str, qube: QubeName, argument: str = "") -> QubeReport:
        try:
            return ask_status(self._backend, qube, argument)
        except AnswerError as error:
            caught = error
        if caught.status == ExitStatus.NO_SERVICE:
            raise self._stopped(step, Has.NO_SERVICE, f"{qube} does not have {STATUS_SERVICE}", qube)
        text = f"{qube} cannot be asked: {caught}"
        raise self._stopped(step, Has.NO_ANSWER, text, qube, helps=helps(qube, caught))

    def _stopped(
        self, step: str, cause: str, text: str, qube: QubeName | None = None, **more: str
    ) -> StoppedError:
        return self._stops.stopped(step, cause, text, REMEDIES.get(cause, _OTHERWISE), qube, **more)
