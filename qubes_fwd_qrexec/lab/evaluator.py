# SPDX-License-Identifier: GPL-2.0-or-later
"""What a qrexec policy says of one call: rules, system and request in, verdict out.

The semantics are those of Qubes' own parser (qubes-core-qrexec qrexec/policy/parser.py), and tests compare
the verdicts of both. Pure; in doubt it denies.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .policytext import PolicyRule, PolicyTextError, Role, Token, TokenKind, Verb

ADMIN_UUID = "00000000-0000-0000-0000-000000000000"
_ADMIN_NAMES = ("@adminvm", "dom0", f"uuid:{ADMIN_UUID}")
_DEFAULT = Token(TokenKind.DEFAULT, "@default")


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """What a policy can know of a qube. ``default_disposable`` is a disposable template's name."""

    name: str
    klass: str
    uuid: str
    is_running: bool = True
    is_internal: bool = False
    template_for_dispvms: bool = False
    default_disposable: str | None = None
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class System:
    """All qubes, to be found by name and as ``uuid:UUID``."""

    domains: Mapping[str, Domain]
    _by_key: dict[str, Domain] = field(init=False)

    def __post_init__(self) -> None:
        by_key = {f"uuid:{domain.uuid}": domain for domain in self.domains.values()}
        object.__setattr__(self, "_by_key", by_key | dict(self.domains))

    def find(self, name: str) -> Domain | None:
        """The qube of that name or ``uuid:UUID``."""
        return self._by_key.get(name)

    def is_same(self, one: str, other: str) -> bool:
        """Whether two texts name one qube; they need not name any."""
        if one in _ADMIN_NAMES or other in _ADMIN_NAMES:
            return one in _ADMIN_NAMES and other in _ADMIN_NAMES
        if one.startswith("uuid:") == other.startswith("uuid:"):
            return one == other
        found = self.find(one)
        return found is not None and found is self.find(other)

    def disposable_of(self, source: str) -> Token | None:
        """What ``@dispvm`` means for a caller."""
        domain = self.find(source)
        if domain is None or domain.default_disposable is None:
            return None
        return Token(TokenKind.DISPOSABLE_OF, f"@dispvm:{domain.default_disposable}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A call as asked for; ``argument`` begins with ``+``, ``target`` may be empty for ``@default``."""

    service: str
    argument: str
    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Allow:
    """``target`` is a name, ``uuid:...``, ``dom0`` or ``@dispvm:...``."""

    target: str
    user: str | None
    can_autostart: bool
    is_notifying: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """The user would choose among ``targets``, sorted."""

    targets: tuple[str, ...]
    default_target: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deny:
    reason: str
    is_notifying: bool = True


Verdict = Allow | Ask | Deny


def evaluate(rules: Sequence[PolicyRule], system: System, request: Request) -> Verdict:
    """The first rule that fits decides. If none does, or the request is malformed, the call is denied."""
    try:
        intended = _verified(Token.parse(request.target or "@default", Role.INTENDED), system)
    except PolicyTextError as error:
        return Deny(reason=str(error))
    if intended is None:
        return Deny(reason=f"not a template for disposables: {request.target}")
    for rule in rules:
        if _fits_but_target(rule, system, request) and _fits(rule.target, intended, system, request.source):
            if rule.verb is Verb.DENY:
                return Deny(reason=f"denied by {rule.place}", is_notifying=rule.is_notifying)
            if rule.verb is Verb.ASK:
                return _ask(rules, rule, system, request)
            return _allow(rule, system, request, intended)
    return Deny(reason="no rule fits")


def _fits_but_target(rule: PolicyRule, system: System, request: Request) -> bool:
    return (
        rule.service in (None, request.service)
        and rule.argument in (None, request.argument)
        and _fits(rule.source, Token(TokenKind.NAME, request.source), system, None)
    )


def _fits(pattern: Token, other: Token, system: System, source: str | None) -> bool:
    """Whether a rule's source or target takes a caller's name or target; ``source`` resolves @dispvm."""
    match pattern.kind:
        case TokenKind.NAME:
            return system.is_same(pattern.text, other.text)
        case TokenKind.WILDCARD:
            return True
        case TokenKind.ADMIN:
            return other.text in _ADMIN_NAMES
        case TokenKind.ANY:
            return other.text not in _ADMIN_NAMES
        case TokenKind.DEFAULT | TokenKind.DISPOSABLE:
            return pattern.text == other.text
        case TokenKind.TYPE:
            domain = system.find(other.text)
            return domain is not None and domain.klass == pattern.value
        case TokenKind.TAG:
            domain = system.find(other.text)
            return domain is not None and pattern.value in domain.tags
        case TokenKind.DISPOSABLE_OF | TokenKind.DISPOSABLE_TAG:
            return _fits_disposable(pattern, other, system, source)


def _fits_disposable(pattern: Token, other: Token, system: System, source: str | None) -> bool:
    disposable: Token | None = other
    if other.kind is TokenKind.DISPOSABLE:
        disposable = None if source is None else system.disposable_of(source)
    if disposable is None or disposable.kind is not TokenKind.DISPOSABLE_OF:
        return False
    if pattern.kind is TokenKind.DISPOSABLE_OF:
        return system.is_same(pattern.value, disposable.value)
    domain = system.find(disposable.value)
    return domain is not None and domain.template_for_dispvms and pattern.value in domain.tags


def _verified(target: Token, system: System) -> Token | None:
    """The target if it exists, ``@default`` for a name that does not; None: no template of disposables."""
    if target.kind is TokenKind.NAME and system.find(target.text) is None:
        return _DEFAULT
    if target.kind is TokenKind.DISPOSABLE_OF:
        domain = system.find(target.value)
        if domain is None or not domain.template_for_dispvms:
            return None
    return target


def _allow(rule: PolicyRule, system: System, request: Request, intended: Token) -> Verdict:
    target = _verified(rule.redirect or intended, system)
    if target is not None and target.kind is TokenKind.DISPOSABLE:
        target = system.disposable_of(request.source)
    if target is None or target.kind is TokenKind.DEFAULT:
        return Deny(reason=f"{rule.place} allows, but neither it nor the caller names a target that exists")
    name = "dom0" if target.text in _ADMIN_NAMES else target.text
    if not rule.can_autostart and not _needs_no_start(name, system):
        return Deny(reason=f"{rule.place}: {name} would have to be started", is_notifying=rule.is_notifying)
    if name == request.source:
        return Deny(reason="loopback qrexec connection not supported")
    return Allow(
        target=name, user=rule.user, can_autostart=rule.can_autostart, is_notifying=rule.is_notifying
    )


def _ask(rules: Sequence[PolicyRule], rule: PolicyRule, system: System, request: Request) -> Verdict:
    targets: Iterable[str] = _targets_for_ask(rules, system, request)
    if rule.redirect is not None:
        targets = ["dom0" if rule.redirect.text in _ADMIN_NAMES else rule.redirect.text]
    if not rule.can_autostart:
        targets = [target for target in targets if _needs_no_start(target, system)]
    choices = tuple(sorted(targets))
    if not choices:
        return Deny(reason=f"{rule.place} asks, but there is no target to choose")
    default = rule.default_target
    if default is not None and default.kind is TokenKind.DISPOSABLE:
        default = system.disposable_of(request.source)
    name = None if default is None else "dom0" if default.text in _ADMIN_NAMES else default.text
    return Ask(targets=choices, default_target=name if name in choices else None)


def _needs_no_start(target: str, system: System) -> bool:
    if target in _ADMIN_NAMES:
        return True
    domain = system.find(target)
    return domain is not None and domain.is_running


def _targets_for_ask(rules: Sequence[PolicyRule], system: System, request: Request) -> set[str]:
    """Every target that some rule would let this call reach; later rules first, so that denials stand."""
    targets: set[str] = set()
    for rule in reversed(rules):
        if _fits_but_target(rule, system, request):
            expansion = set(_expand(rule.redirect or rule.target, system))
            if rule.verb is Verb.DENY:
                targets -= expansion
            else:
                targets |= expansion
    if "@dispvm" in targets:
        targets.discard("@dispvm")
        disposable = system.disposable_of(request.source)
        if disposable is not None:
            targets.add(disposable.text)
    if "@adminvm" in targets:
        targets.discard("@adminvm")
        targets.add("dom0")
    source = system.find(request.source)
    if source is not None:
        targets.discard(source.name)
    return {target for target in targets if not _is_internal(target.removeprefix("@dispvm:"), system)}


def _is_internal(name: str, system: System) -> bool:
    domain = system.find(name)
    return domain is not None and domain.is_internal


def _expand(pattern: Token, system: System) -> Iterator[str]:
    """The targets that a rule's target stands for, by name."""
    match pattern.kind:
        case TokenKind.NAME:
            domain = system.find(pattern.text)
            if domain is not None:
                yield domain.name
        case TokenKind.ADMIN | TokenKind.DISPOSABLE:
            yield pattern.text
        case TokenKind.WILDCARD | TokenKind.ANY:
            yield "@dispvm"
            for domain in system.domains.values():
                if pattern.kind is TokenKind.WILDCARD or domain.name not in _ADMIN_NAMES:
                    yield domain.name
                if domain.template_for_dispvms:
                    yield f"@dispvm:{domain.name}"
        case TokenKind.TYPE:
            yield from (domain.name for domain in system.domains.values() if domain.klass == pattern.value)
        case TokenKind.TAG:
            yield from (domain.name for domain in system.domains.values() if pattern.value in domain.tags)
        case TokenKind.DISPOSABLE_OF:
            domain = system.find(pattern.value)
            if domain is not None and domain.template_for_dispvms:
                yield f"@dispvm:{domain.name}"
        case TokenKind.DISPOSABLE_TAG:
            for domain in system.domains.values():
                if domain.template_for_dispvms and pattern.value in domain.tags:
                    yield f"@dispvm:{domain.name}"
        case TokenKind.DEFAULT:
            return
