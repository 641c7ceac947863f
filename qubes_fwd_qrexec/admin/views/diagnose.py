# SPDX-License-Identifier: GPL-2.0-or-later
"""The command diagnose: the whole way of a forward, from its rule to the server, up to the first thing wrong.

Each step looks at one thing and says what it found; what a qube says of itself is believed only as far
as it goes, for the last step sends a connection all the way.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, NamedTuple

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.answers import NO_SERVICE, REFUSED, AnswerError
from qubes_fwd_qrexec.admin.figures import ask
from qubes_fwd_qrexec.admin.inventory import CONFIG_PREFIX, OFFER_PREFIX, Inventory, Qube
from qubes_fwd_qrexec.admin.judged import judged
from qubes_fwd_qrexec.admin.states import Cause, Forward, State
from qubes_fwd_qrexec.common.config import ListenerConfig, Service
from qubes_fwd_qrexec.common.report import Answer, Firewall, FirewallReport, QubeReport, Trial
from qubes_fwd_qrexec.common.rules import BrokenRule, Proxy
from qubes_fwd_qrexec.common.services import STATUS_SERVICE
from qubes_fwd_qrexec.common.values import QubeName

from . import reasons
from .render import broken_line, escaped
from .session import Session
from .tables import Colour, Style

# The unit of the listener, and the Qubes service that starts it.
LISTENER = "qubes-forward-listener"
_PACKAGE = "qubes-fwd-qrexec"


# Nothing is said to the server, so a protocol that it does not share with its clients is not found.
_WELL = "Nothing on the way to the server is wrong. What the server says to clients was not tried."


class Verdict(StrEnum):
    OK = "ok"
    UNKNOWN = "unknown"
    STOPS = "stops"


class Finding(NamedTuple):
    """What one step found; ``remedy`` is there where it stops."""

    step: str
    verdict: Verdict
    text: str
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"step": self.step, "verdict": self.verdict, "text": self.text, "remedy": self.remedy}


def diagnose(args: Namespace, session: Session) -> int:
    """Walk the way; status 0 if nothing on it is wrong."""
    snapshot = session.look(with_config=True)
    entry = snapshot.find(args.qube, args.name)
    if isinstance(entry, BrokenRule):
        text = broken_line(entry, Style()).rstrip("\n")
        findings = [Finding("rule", Verdict.STOPS, text, f"'qvm-forward remove {entry}'")]
    else:
        planned = snapshot.plan(session.now)
        forward = planned.find(entry.target, entry.name)
        if forward is None:
            return 1
        findings = list(_until_wrong(_Walk(session, forward, snapshot.inventory).steps()))
    is_well = not any(finding.verdict is Verdict.STOPS for finding in findings)
    if session.is_json:
        steps = [finding.as_json() for finding in findings]
        session.say_json({"qube": args.qube, "name": args.name, "is_well": is_well, "steps": steps})
    else:
        session.say("".join(_lines(findings, session.style)))
        session.say(f"{_WELL}\n" if is_well else "")
    return 0 if is_well else 1


_COLOURS = {Verdict.OK: Colour.GREEN, Verdict.UNKNOWN: Colour.YELLOW, Verdict.STOPS: Colour.RED}


def _lines(findings: list[Finding], style: Style) -> Iterator[str]:
    width = max(len(finding.step) for finding in findings)
    for finding in findings:
        verdict = style.colour(_COLOURS[finding.verdict], finding.verdict.ljust(len(Verdict.UNKNOWN)))
        yield f"{verdict}  {finding.step.ljust(width)}  {escaped(finding.text)}\n"
        if finding.remedy:
            yield f"What helps: {escaped(finding.remedy)}\n"


def _until_wrong(steps: Iterator[Finding]) -> Iterator[Finding]:
    for finding in steps:
        yield finding
        if finding.verdict is Verdict.STOPS:
            return


class _Walk:
    """The steps for one forward, each a method, in the order of the way."""

    def __init__(self, session: Session, forward: Forward, inventory: Inventory) -> None:
        self._backend = session.backend
        self._forward = forward
        self._inventory = inventory
        self._target = inventory.qubes[forward.source.target]
        self._name = str(forward.source)
        # Of a range the first port stands for all.
        self._port = forward.source.rule.target_ports.first
        self._server_trial: Trial | None = None

    def steps(self) -> Iterator[Finding]:
        """Lazily: a step is only taken after the one before it; each relies on that."""
        yield self._rule()
        exposed, config = self._forward.exposed, self._forward.config
        if exposed is None or config is None:
            return
        qube = self._inventory.qubes[exposed]
        yield self._exposed(qube)
        yield self._applied(qube, config)
        try:
            answer = ask(self._backend, exposed)
        except AnswerError as error:
            # What a template has told dom0 may be old; a qube that answers has the package.
            yield self._installed(qube)
            yield self._not_asked("listener", exposed, error)
            return
        yield Finding("listener installed", Verdict.OK, f"{qube.name} has {_PACKAGE}, and answers")
        yield self._listener(exposed, answer)
        yield self._firewall(exposed, config, answer.firewall)
        yield self._policy(exposed)
        yield self._target_runs()
        yield self._service()
        if self._target.is_running:
            yield self._server()
            yield self._round_trip(exposed)

    def _rule(self) -> Finding:
        forward = self._forward
        if forward.is_live:
            return Finding("rule", Verdict.OK, f"{self._name} is {forward.state}")
        remedies = {
            State.DISABLED: f"'qvm-forward enable {self._name}'",
            State.EXPIRED: f"'qvm-forward set {self._name} expire=+8h' gives it more time",
        }
        remedy = remedies.get(forward.state, self._ways_out())
        if forward.cause is Cause.HELD:
            remedy = "'qvm-forward resume'"
        return Finding(
            "rule", Verdict.STOPS, f"{self._name} is {forward.state}. {reasons.sentence(forward)}", remedy
        )

    def _ways_out(self) -> str:
        """The commands that could open it; where one has to be agreed to after it, that too."""
        first = [f"'{' '.join(words)}'" for words in reasons.ways_out(self._forward) if words[1] != "confirm"]
        confirm = f"'qvm-forward confirm {self._name}'"
        if self._forward.state is not State.SUSPENDED:
            return " or ".join(first) or f"'qvm-forward show {self._name}' shows all that guards it"
        is_enough = reasons.ways_out(self._forward)[:1] == (
            ("qvm-forward", "confirm", *self._forward.source[:2]),
        )
        if is_enough or not first:
            return f"{confirm} if it is to be so"
        return f"{' or '.join(first)}, then {confirm}"

    def _exposed(self, qube: Qube) -> Finding:
        if qube.is_running and self._forward.cause is not Cause.EXPOSED_HALTED:
            return Finding("exposed qube", Verdict.OK, f"{qube.name} is running")
        return Finding(
            "exposed qube",
            Verdict.STOPS,
            f"{qube.name}, which is to listen, is halted",
            f"'qvm-start {qube.name}'",
        )

    def _applied(self, exposed: Qube, config: ListenerConfig) -> Finding:
        allowed = policy.allowing(self._backend.read_policy().text)
        told = exposed.features.get(f"{CONFIG_PREFIX}{config.key}")
        lacking = [
            f"dom0's policy lacks '{line}'" for line in policy.lines(self._forward) if line not in allowed
        ]
        if told != str(config):
            lacking.append(f"{exposed.name} is told {'nothing' if told is None else 'something else'} of it")
        if not lacking:
            return Finding("applied", Verdict.OK, "policy and listener are told what the rule asks for")
        return Finding("applied", Verdict.STOPS, "; ".join(lacking), "'qvm-forward apply'")

    def _installed(self, qube: Qube) -> Finding:
        if self._inventory.feature(qube.name, f"{OFFER_PREFIX}{Service.FORWARD_TCP}"):
            return Finding("listener installed", Verdict.OK, f"{qube.name} has {_PACKAGE}")
        where = qube.template or qube.name
        return Finding(
            "listener installed",
            Verdict.STOPS,
            f"{qube.name} has not told dom0 that it has {_PACKAGE}",
            f"install {_PACKAGE} in {where}, shut {where} down, and start {qube.name} again",
        )

    def _listener(self, exposed: QubeName, answer: QubeReport) -> Finding:
        def stops(text: str, remedy: str) -> Finding:
            return Finding("listener", Verdict.STOPS, text, remedy)

        if answer.listener is None:
            return stops(
                f"{exposed}: {answer.listener_problem or 'no listener is running'}",
                f"'qvm-service {exposed} {LISTENER} on' and start {exposed} again; if it is on, "
                f"'systemctl status {LISTENER}' in {exposed} says why it does not run",
            )
        key = "" if self._forward.config is None else self._forward.config.key
        problem = next((p.text for p in answer.listener.problems if p.key == key), None)
        found = answer.listener.find(self._forward.source.target, self._forward.source.name)
        if problem is not None:
            remedy = (
                f"mend that in {exposed}, or choose another port or address: "
                f"'qvm-forward set {self._name} srcports=PORT', or listen=ADDRESS"
            )
            return stops(f"the listener of {exposed} cannot open it: {problem}", remedy)
        if found is None or not found.is_listening:
            remedy = (
                f"'journalctl -u {LISTENER}' in {exposed} says why; 'systemctl restart {LISTENER}' there "
                "reads everything again"
            )
            return stops(f"the listener of {exposed} does not have {self._name} open", remedy)
        ports = self._forward.source.rule.listen_ports.worded()
        return Finding("listener", Verdict.OK, f"{exposed} listens on {ports}")

    def _firewall(self, exposed: QubeName, config: ListenerConfig, told: FirewallReport) -> Finding:
        """For those IP versions that it listens on and that its clients have."""
        remedy = f"'systemctl status qubes-forward-nft' in {exposed} says why"
        if config.key in told.waiting:
            text = f"the firewall of {exposed} lets nobody in to a port that the listener does not listen on"
            return Finding("firewall", Verdict.STOPS, text, remedy)
        listened = {address.version for address in config.listen}
        words = {
            name: word
            for version, name, word in ((4, "IPv4", told.ip), (6, "IPv6", told.ip6))
            if version in (listened & config.sources.versions or listened)
        }
        by = {word: " and ".join(name for name in words if words[name] is word) for word in Firewall}
        if set(words.values()) == {Firewall.CLOSED}:
            text = f"the firewall of {exposed} drops what comes to the port by {by[Firewall.CLOSED]}"
            return Finding("firewall", Verdict.STOPS, text, remedy)
        parts = (
            (Firewall.OPEN, f"lets clients in by {by[Firewall.OPEN]}"),
            (Firewall.CLOSED, f"drops what comes by {by[Firewall.CLOSED]}"),
            (Firewall.UNKNOWN, f"is not known to let clients in by {by[Firewall.UNKNOWN]}"),
        )
        text = ", ".join(part for word, part in parts if by[word])
        # Which of them a client uses is the client's choice: what is open does not make up for what is not.
        verdict = Verdict.OK if set(words.values()) == {Firewall.OPEN} else Verdict.UNKNOWN
        return Finding("firewall", verdict, f"the firewall of {exposed} {text}")

    def _policy(self, exposed: QubeName) -> Finding:
        service, target = self._forward.service, self._target.name
        verdict = judged([self._forward], self._backend, self._backend.read_policy().text)[
            self._forward.source[:2]
        ]
        if verdict.is_allowed is None:
            return Finding("policy", Verdict.UNKNOWN, verdict.reason)
        if verdict.is_allowed:
            return Finding("policy", Verdict.OK, f"dom0 allows {service} from {exposed} to {target}")
        return Finding(
            "policy",
            Verdict.STOPS,
            f"dom0 denies {service} from {exposed} to {target}: {verdict.reason}",
            "look for a line in a policy file that sorts before 30-forward.policy, or for a file that "
            "cannot be read: 'qubes-policy-lint' in dom0",
        )

    def _target_runs(self) -> Finding:
        name = self._target.name
        if self._target.is_running:
            return Finding("target", Verdict.OK, f"{name} is running")
        if self._forward.source.rule.autostart:
            return Finding("target", Verdict.UNKNOWN, f"{name} is halted, and a connection starts it")
        return Finding(
            "target",
            Verdict.STOPS,
            f"{name} is halted, and connections may not start it",
            f"'qvm-start {name}', or 'qvm-forward set {self._name} autostart=yes'",
        )

    def _service(self) -> Finding:
        """The plan has looked for what the template offers; whether the target has it, the target says."""
        service, name = self._forward.service, self._target.name
        if not self._target.is_running or service is not Service.FORWARD_TCP:
            return Finding("service", Verdict.UNKNOWN, f"{name} is not asked whether it has {service}")
        try:
            self._server_trial = ask(self._backend, name, str(self._port)).trial
        except AnswerError as error:
            return self._not_asked("service", name, error)
        return Finding("service", Verdict.OK, f"{name} has {_PACKAGE}, and answers")

    def _server(self) -> Finding:
        name, trial = self._target.name, self._server_trial
        if trial is None:
            return Finding("server", Verdict.UNKNOWN, f"{name} is not asked whether a server listens")
        if trial.answer is Answer.THROUGH:
            return Finding("server", Verdict.OK, f"a server in {name} takes connections on port {self._port}")
        return Finding(
            "server",
            Verdict.STOPS,
            f"no server in {name} takes connections on port {self._port} of 127.0.0.1 or ::1: {trial.text}",
            f"start the server in {name}, and have it listen on 127.0.0.1; 'ss -ltn' there shows who listens",
        )

    def _round_trip(self, exposed: QubeName) -> Finding:
        config = self._forward.config
        try:
            trial = ask(self._backend, exposed, "" if config is None else config.key).trial
        except AnswerError as error:
            return self._not_asked("round trip", exposed, error)
        if trial is None or trial.answer is Answer.SILENT:
            text = f"a connection from {exposed} was not refused, and nothing was heard of it"
            return Finding("round trip", Verdict.UNKNOWN, text if trial is None else f"{text}: {trial.text}")
        if trial.answer is Answer.THROUGH:
            text = f"a connection from {exposed} reached the server, {self._header()}"
            return Finding("round trip", Verdict.OK, text)
        return Finding(
            "round trip",
            Verdict.STOPS,
            f"a connection from {exposed} did not reach the server: {trial.text}",
            _remedy(trial, exposed, self._target.name),
        )

    def _header(self) -> str:
        """What a server that expects something else refuses, and nobody here sees."""
        proxy = self._forward.source.rule.proxy
        if proxy is Proxy.OFF:
            return "which gets no PROXY header (proxy=v1 or proxy=v2 sends one, where it expects one)"
        return (
            f"which must expect a PROXY header, version {str(proxy).removeprefix('v')} (proxy=off sends none)"
        )

    def _not_asked(self, step: str, qube: QubeName, error: AnswerError) -> Finding:
        where = self._inventory.qubes[qube].template or qube
        if error.status == NO_SERVICE:
            return Finding(
                step,
                Verdict.STOPS,
                f"{qube} does not have {STATUS_SERVICE}",
                f"install or update {_PACKAGE} in {where}, shut {where} down, and start {qube} again",
            )
        remedy = error.way_out or f"look into {qube}, or restart it"
        if error.status == REFUSED and not error.way_out:
            remedy = f"{qube} may have as many calls as it can: wait until some have ended, or restart it"
        return Finding(step, Verdict.STOPS, f"{qube} cannot be asked: {error}", remedy)


_REMEDIES: dict[str, Callable[[str, str], str]] = {
    "policy": lambda exposed, target: (
        "'journalctl -u qubes-qrexec-policy-daemon' in dom0 says why the call was refused; "
        f"{target} may also have as many calls as it can"
    ),
    "no-service": lambda exposed, target: (
        f"install {_PACKAGE} in the template of {target} and restart {target}"
    ),
    "server": lambda exposed, target: f"the server in {target} took no connection; see what it logs",
    # With the stock service this is also how a server that does not listen looks.
    "no-call": lambda exposed, target: (
        f"see that the server in {target} runs and listens on 127.0.0.1; 'journalctl -u {LISTENER}' in "
        f"{exposed} says how calls fail"
    ),
    "busy": lambda exposed, target: f"wait until some connections to {target} have ended",
}


def _remedy(trial: Trial, exposed: str, target: str) -> str:
    found = _REMEDIES.get(trial.reason)
    if found is not None:
        return found(exposed, target)
    return f"'journalctl -u {LISTENER}' in {exposed}, and the journal of {target}, say more"
