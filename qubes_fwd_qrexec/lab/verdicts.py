# SPDX-License-Identifier: GPL-2.0-or-later
"""Who judges calls in a lab: Qubes' own policy parser where it is installed, else our evaluator.

This also checks a judge against a file of recorded verdicts, which keeps our evaluator true to the parser.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from qubes_fwd_qrexec.common.errors import StoreError

from .evaluator import Allow, Ask, Deny, Domain, Request, System, Verdict, evaluate
from .policytext import PolicyRule, PolicyTextError, load_policy


class Judge(Protocol):
    """Reads a policy directory and judges requests by it."""

    name: str

    def load(self, directory: Path) -> "LoadedPolicy":
        """Raises `PolicyTextError` for a policy that denies everything because it cannot be read."""


class LoadedPolicy(Protocol):
    def judge(self, system: System, request: Request) -> Verdict: ...


class OwnJudge:
    """Our evaluator of the subset."""

    name = "lab"

    def load(self, directory: Path) -> LoadedPolicy:
        return _OwnPolicy(directory)


class _OwnPolicy:
    """By argument, since most lines are about one: those that may fit a call are few of many."""

    def __init__(self, directory: Path) -> None:
        self._rules: dict[str | None, list[tuple[int, PolicyRule]]] = {}
        for place, rule in enumerate(load_policy(directory)):
            self._rules.setdefault(rule.argument, []).append((place, rule))

    def judge(self, system: System, request: Request) -> Verdict:
        some = (*self._rules.get(None, ()), *self._rules.get(request.argument, ()))
        return evaluate([rule for _, rule in sorted(some, key=itemgetter(0))], system, request)


class QubesJudge:
    """The real parser, qrexec.policy.parser. Raises ImportError when made where it is not installed."""

    name = "qrexec"

    def __init__(self) -> None:
        import importlib

        self._parser: Any = importlib.import_module("qrexec.policy.parser")
        self._errors: Any = importlib.import_module("qrexec.exc")

    def load(self, directory: Path) -> LoadedPolicy:
        try:
            policy = self._parser.FilePolicy(policy_path=directory)
        # Besides its own error it lets through what open() and decoding raise.
        except (self._errors.AccessDenied, OSError, UnicodeDecodeError) as error:
            raise PolicyTextError(str(error)) from error
        return _QubesPolicy(policy, self._parser, self._errors)


class _QubesPolicy:
    def __init__(self, policy: Any, parser: Any, errors: Any) -> None:
        self._policy = policy
        self._parser = parser
        self._errors = errors

    def judge(self, system: System, request: Request) -> Verdict:
        try:
            resolution = self._policy.evaluate(
                self._parser.Request(
                    request.service,
                    request.argument,
                    request.source,
                    request.target,
                    system_info={"domains": _system_info(system)},
                )
            )
        except self._errors.AccessDenied as error:
            return Deny(reason=str(error), is_notifying=error.notify)
        except (AssertionError, AttributeError, KeyError) as error:
            # What its asserts and lookups raise where a qube that is named does not exist; dom0's daemon
            # gets no answer then, and refuses the call.
            return Deny(reason=f"the policy parser failed: {type(error).__name__}: {error}")
        if isinstance(resolution, self._parser.AskResolution):
            default = resolution.default_target
            return Ask(
                targets=tuple(sorted(map(str, resolution.targets_for_ask))),
                default_target=None if default is None else str(default),
            )
        # What AllowResolution.execute() would still refuse.
        if resolution.target == request.source:
            return Deny(reason="loopback qrexec connection not supported")
        return Allow(
            target=str(resolution.target),
            user=resolution.user,
            can_autostart=resolution.autostart,
            is_notifying=resolution.notify,
        )


def best_judge() -> Judge:
    """Qubes' own parser if the ``qrexec`` package can be imported, else our evaluator."""
    try:
        return QubesJudge()
    except ImportError:
        return OwnJudge()


def _system_info(system: System) -> dict[str, dict[str, object]]:
    """In the form of qrexec.utils.get_system_info(): every qube under its name and its uuid."""
    info: dict[str, dict[str, object]] = {}
    for domain in system.domains.values():
        entry: dict[str, object] = {
            "name": domain.name,
            "type": domain.klass,
            "uuid": domain.uuid,
            "tags": sorted(domain.tags),
            "template_for_dispvms": domain.template_for_dispvms,
            "default_dispvm": domain.default_disposable,
            "power_state": "Running" if domain.is_running else "Halted",
            "internal": domain.is_internal,
            "icon": "appvm-red",
            "label": "red",
            "guivm": None,
            "relayvm": None,
            "transport_rpc": None,
        }
        info[domain.name] = info[f"uuid:{domain.uuid}"] = entry
    return info


@dataclass(frozen=True, slots=True)
class Difference:
    """A case in which the judge does not say what was recorded."""

    index: int
    policy: str
    request: Mapping[str, str]
    recorded: Mapping[str, object]
    found: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Comparison:
    agreed: int
    differences: tuple[Difference, ...]


def play(path: Path, judge: Judge) -> Comparison:
    """Judge every case of a file of recorded verdicts; raises `StoreError` if it is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        system = System(
            {
                name: Domain(
                    name=name,
                    klass=entry["type"],
                    uuid=entry["uuid"],
                    is_running=entry["power_state"] == "Running",
                    is_internal=entry.get("internal", False),
                    template_for_dispvms=entry["template_for_dispvms"],
                    default_disposable=entry["default_dispvm"],
                    tags=frozenset(entry["tags"]),
                )
                for name, entry in data["system_info"]["domains"].items()
                if not name.startswith("uuid:")
            }
        )
        cases = [(case["policy"], Request(**case["request"]), case["result"]) for case in data["cases"]]
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: no file of verdicts: {type(error).__name__}: {error}") from error
    differences = []
    with tempfile.TemporaryDirectory(prefix="verdicts-") as directory:
        file = Path(directory, "30-forward.policy")
        for index, (policy, request, recorded) in enumerate(cases):
            file.write_text(policy, encoding="utf-8")
            try:
                found = as_json(judge.load(Path(directory)).judge(system, request))
            except PolicyTextError:
                found = {"outcome": "syntax-error"}
            if found != recorded:
                asked = data["cases"][index]["request"]
                differences.append(Difference(index, policy, asked, recorded, found))
    return Comparison(len(cases) - len(differences), tuple(differences))


def as_json(verdict: Verdict) -> dict[str, object]:
    """A verdict in the words of the recorded ones."""
    match verdict:
        case Allow():
            return {
                "outcome": "allow",
                "target": verdict.target,
                "user": verdict.user,
                "autostart": verdict.can_autostart,
                "notify": verdict.is_notifying,
            }
        case Ask():
            return {
                "outcome": "ask",
                "targets": list(verdict.targets),
                "default_target": verdict.default_target,
            }
        case Deny():
            return {"outcome": "deny", "notify": verdict.is_notifying}
