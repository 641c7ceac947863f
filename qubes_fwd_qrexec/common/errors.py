# SPDX-License-Identifier: GPL-2.0-or-later
"""Every error that this project raises on purpose.

Errors about a user's mistake name its place, the text found there, and what would be right. Mistakes of a
peer and of our own are distinguished, because the first end a mux and the second are bugs.
"""

from typing import TypeVar

_E = TypeVar("_E", bound=BaseException)
# Characters of a text. Whoever pasted a file into a field still has to read what is wrong with it.
_QUOTED_MAX = 50


class ForwardError(Exception):
    """The base class of all others; its text is one sentence for the user."""


class TextError(ForwardError):
    """A piece of text is not what its role asks for.

    ``text`` is what was found, ``expected`` says what would be right. Callers that know where the text was
    turn this into a `RuleError` or `ConfigError` that names the place.
    """

    def __init__(self, text: str, expected: str) -> None:
        quoted = f"{text!a}" if len(text) <= _QUOTED_MAX else f"{text[:_QUOTED_MAX]!a}..."
        super().__init__(f"{quoted} is not {expected}")
        self.text = text
        self.expected = expected


class RuleError(ForwardError):
    """A rule cannot be read, or contradicts itself.

    ``place`` names the option and where it stands (``option 'srcports' at column 17``); ``options`` are the
    names of the options that are wrong, where it is about options.
    """

    def __init__(self, place: str, problem: str, *options: str) -> None:
        super().__init__(f"{place}: {problem}")
        self.place = place
        self.problem = problem
        self.options = options


class UsageError(ForwardError):
    """A request makes no sense.

    ``options`` are the names of the rule's options that are wrong, as they are spelled in a rule.
    """

    def __init__(self, text: str, *options: str) -> None:
        super().__init__(text)
        self.options = options


class ConfigError(ForwardError):
    """A listener's configuration cannot be read; the text names the entry and the option."""


class StoreError(ForwardError):
    """Stored data about qubes, rules or policy cannot be read or written."""


class StoredError(StoreError):
    """A change is stored, and not all of it could be put in force."""

    def __init__(self, why: object) -> None:
        super().__init__(f"the change is stored, but {why}")


class RefusedError(ForwardError):
    """A valid request is refused; the text gives the reason and the way out.

    ``kind`` is one word for counters, such as those of `refusals.Refusal`.
    """

    def __init__(self, text: str, kind: str = "no-call") -> None:
        super().__init__(text)
        self.kind = kind


class ProtocolError(ForwardError):
    """The base class of both errors of the mux protocol."""


class LocalProtocolError(ProtocolError):
    """This end was asked to do something that the protocol does not allow now: a bug of the caller."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol, which ends the mux."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of something; the text says what is done, and what completes it."""


def why(error: Exception) -> str:
    """What went wrong, for a message that names the place: an `OSError` without file and number."""
    return getattr(error, "strerror", None) or str(error)


def leaves(group: BaseExceptionGroup[_E]) -> list[_E]:
    """All errors in a group and in the groups within it, in order."""
    found: list[_E] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
