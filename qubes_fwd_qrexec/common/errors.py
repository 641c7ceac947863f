# SPDX-License-Identifier: GPL-2.0-or-later
"""Every error that this project raises on purpose.

A user's mistake names its place, the text found there and what would be right. A peer's mistake and
our own are told apart, because the first ends a mux and the second is a bug.
"""

from typing import TypeVar

_E = TypeVar("_E", bound=BaseException)


class ForwardError(Exception):
    """The base of all others; its text is one sentence for the user."""


class TextError(ForwardError):
    """A piece of text is not what its role asks for.

    ``text`` is what was found, ``expected`` says what would be right. Whoever knows where the text
    stood turns this into a `RuleError` or `ConfigError` that names the place.
    """

    def __init__(self, text: str, expected: str) -> None:
        super().__init__(f"{text!a} is not {expected}")
        self.text = text
        self.expected = expected


class RuleError(ForwardError):
    """A rule cannot be read or is at odds with itself.

    ``place`` names the option and where it stands (``option 'srcports' at column 17``); ``options`` are the
    names of the options that are wrong, where it is about options.
    """

    def __init__(self, place: str, problem: str, *options: str) -> None:
        super().__init__(f"{place}: {problem}")
        self.place = place
        self.problem = problem
        self.options = options


class UsageError(ForwardError):
    """What is asked for makes no sense.

    ``options`` are the names of the rule's options that are wrong, as a rule's line spells them.
    """

    def __init__(self, text: str, *options: str) -> None:
        super().__init__(text)
        self.options = options


class ConfigError(ForwardError):
    """A listener's configuration cannot be read; the text names the entry and the option."""


class StoreError(ForwardError):
    """What is stored about qubes, rules or policy cannot be read or written."""


class RefusedError(ForwardError):
    """A request is understood and not done, for a reason that the text gives with the way out.

    ``kind`` is one word for counters, such as those of `counters.Refusal`.
    """

    def __init__(self, text: str, kind: str = "no-call") -> None:
        super().__init__(text)
        self.kind = kind


class ProtocolError(ForwardError):
    """The base of both errors of the mux protocol."""


class LocalProtocolError(ProtocolError):
    """This end was asked to do what the protocol does not allow at this point: a bug of the caller."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol; the mux ends."""


def why(error: Exception) -> str:
    """What went wrong, for a text that has named the place: `OSError` says its file again, and a number."""
    return getattr(error, "strerror", None) or str(error)


def leaves(group: BaseExceptionGroup[_E]) -> list[_E]:
    """The errors in a group, and in the groups within it, in their order."""
    found: list[_E] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
