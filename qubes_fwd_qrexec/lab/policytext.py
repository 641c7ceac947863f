# SPDX-License-Identifier: GPL-2.0-or-later
"""Qrexec policy from its text: files to rules, or the one error that denies every call.

The subset of qubes-core-qrexec qrexec/policy/parser.py that has no includes: ``!`` directives are an
error here, so that a policy which rests on them denies instead of allowing by accident.
"""

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path

from qubes_fwd_qrexec.common.errors import ForwardError, why

# qrexec/__init__.py, RPCNAME_ALLOWED_CHARSET, and parser.py, FILENAME_ALLOWED_CHARSET.
_CALL_TEXT = re.compile(r"[A-Za-z0-9+._-]*\Z", re.ASCII)
_FILE_CHARACTERS = frozenset(string.digits + string.ascii_lowercase + "_.-")
SUFFIX = ".policy"


class PolicyTextError(ForwardError):
    """A policy cannot be read as a whole, and so denies everything; the text names file and line."""


class TokenKind(Enum):
    """What a token may stand for; the value is the text it is, or begins with."""

    NAME = ""
    WILDCARD = "*"
    ADMIN = "@adminvm"
    ANY = "@anyvm"
    DEFAULT = "@default"
    DISPOSABLE = "@dispvm"
    TYPE = "@type:"
    TAG = "@tag:"
    DISPOSABLE_OF = "@dispvm:"
    DISPOSABLE_TAG = "@dispvm:@tag:"


_PREFIXES = (TokenKind.TYPE, TokenKind.TAG, TokenKind.DISPOSABLE_OF, TokenKind.DISPOSABLE_TAG)


class Role(Enum):
    """Where a token stands, and which kinds may stand there."""

    SOURCE = frozenset(set(TokenKind) - {TokenKind.DEFAULT, TokenKind.DISPOSABLE})
    TARGET = frozenset(TokenKind)
    REDIRECT = frozenset(
        {TokenKind.NAME, TokenKind.ADMIN, TokenKind.DISPOSABLE, TokenKind.DISPOSABLE_OF},
    )
    INTENDED = frozenset(REDIRECT | {TokenKind.DEFAULT})


@dataclass(frozen=True, slots=True)
class Token:
    """A qube's name, ``uuid:`` or keyword; ``text`` is all of it, ``value`` what follows a prefix."""

    kind: TokenKind
    text: str

    @classmethod
    def parse(cls, text: str, role: Role) -> "Token":
        """Raises `PolicyTextError`. A plain name is not looked at: the real parser takes any."""
        if not text.startswith("@") and text not in ("", "*"):
            return cls(TokenKind.NAME, text)
        for kind in role.value - {TokenKind.NAME}:
            if kind in _PREFIXES:
                value = text.removeprefix(kind.value)
                if value not in ("", text) and not value.startswith("@"):
                    return cls(kind, text)
            elif text == kind.value:
                return cls(kind, text)
        raise PolicyTextError(f"{text!a} cannot stand as {role.name.lower()}")

    @property
    def value(self) -> str:
        return self.text.removeprefix(self.kind.value)


class Verb(StrEnum):
    ALLOW = "allow"
    ASK = "ask"
    DENY = "deny"


_OPTIONS = {
    Verb.ALLOW: frozenset({"target", "user", "notify", "autostart"}),
    Verb.ASK: frozenset({"target", "default_target", "user", "notify", "autostart"}),
    Verb.DENY: frozenset({"notify"}),
}
_SWITCHES = frozenset({"notify", "autostart"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRule:
    """One line; ``service`` and ``argument`` are None where the line has ``*``."""

    place: str
    service: str | None
    argument: str | None
    source: Token
    target: Token
    verb: Verb
    redirect: Token | None
    default_target: Token | None
    user: str | None
    is_notifying: bool
    can_autostart: bool

    @classmethod
    def parse(cls, line: str, place: str) -> "PolicyRule":
        """Raises `PolicyTextError`, without the place."""
        words = line.split()
        if len(words) < 5:
            raise PolicyTextError(f"{len(words)} fields; a line has SERVICE ARGUMENT SOURCE TARGET ACTION")
        service, argument = _check_call(words[0], words[1])
        if words[4] not in tuple(Verb):
            raise PolicyTextError(f"{words[4]!a} is no action; there are {', '.join(Verb)}")
        verb = Verb(words[4])
        options = _options(verb, words[5:])
        target = Token.parse(words[3], Role.TARGET)
        if target.kind is TokenKind.DEFAULT and verb is Verb.ALLOW and "target" not in options:
            raise PolicyTextError("allow for @default must have target=")
        return cls(
            place=place,
            service=service,
            argument=argument,
            source=Token.parse(words[2], Role.SOURCE),
            target=target,
            verb=verb,
            redirect=_redirect(options.get("target")),
            default_target=_redirect(options.get("default_target")),
            user=options.get("user"),
            is_notifying=options.get("notify", "yes" if verb is Verb.DENY else "no") == "yes",
            can_autostart=options.get("autostart", "yes") == "yes",
        )


def parse_policy(text: str, name: str = "policy") -> list[PolicyRule]:
    """The rules of one file, in order; raises `PolicyTextError` that names file and line."""
    rules = []
    # Not splitlines(): it parts at form feeds and U+2028 too, where qrexec sees one line.
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        place = f"{name}:{number}"
        try:
            if stripped.startswith("!"):
                raise PolicyTextError(f"the lab does not know {stripped.split()[0]!a}")
            rules.append(PolicyRule.parse(stripped, place))
        except PolicyTextError as error:
            raise PolicyTextError(f"{place}: {error}") from None
    return rules


def policy_files(directory: Path) -> list[Path]:
    """The files that count, in the order that counts; raises `PolicyTextError` for a name qrexec refuses."""
    try:
        paths = [
            path
            for path in directory.iterdir()
            if path.suffix == SUFFIX and not path.name.startswith(".") and path.is_file()
        ]
    except OSError as error:
        raise PolicyTextError(f"{directory}: {error.strerror}") from error
    for path in paths:
        if not _FILE_CHARACTERS.issuperset(path.name):
            raise PolicyTextError(f"{path}: only [0-9a-z_.-] may be in a policy file's name")
    return sorted(paths)


def load_policy(directory: Path) -> list[PolicyRule]:
    """All rules of a policy directory, in order; raises `PolicyTextError` if one file is not right."""
    rules: list[PolicyRule] = []
    for path in policy_files(directory):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyTextError(f"{path}: {why(error)}") from error
        rules += parse_policy(text, path.name)
    return rules


def _check_call(service: str, argument: str) -> tuple[str | None, str | None]:
    if service != "*" and ("+" in service or not _CALL_TEXT.match(service)):
        raise PolicyTextError(f"service {service!a}: only [A-Za-z0-9._-] or *")
    if argument != "*":
        if not argument.startswith("+") or not _CALL_TEXT.match(argument):
            raise PolicyTextError(f"argument {argument!a}: a + and then [A-Za-z0-9+._-], or *")
        if service == "*":
            raise PolicyTextError("service * goes with argument * alone")
    return (None if service == "*" else service), (None if argument == "*" else argument)


def _options(verb: Verb, words: Iterable[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise PolicyTextError(f"{word!a} is not OPTION=VALUE")
        if key not in _OPTIONS[verb]:
            raise PolicyTextError(
                f"{key!a} is no option of {verb}; it has {', '.join(sorted(_OPTIONS[verb]))}"
            )
        if key in options:
            raise PolicyTextError(f"{key!a} stands twice")
        if key in _SWITCHES and value not in ("yes", "no"):
            raise PolicyTextError(f"{word!a}: yes or no")
        options[key] = value
    return options


def _redirect(text: str | None) -> Token | None:
    return None if text is None else Token.parse(text, Role.REDIRECT)
