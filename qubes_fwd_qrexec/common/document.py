# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading a JSON document of an untrusted qube, member by member.

Sizes, types and charset are checked, and an invalid document is refused as a whole. Unknown keys are
ignored, so that a newer qube may add some under the same version.
"""

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, TypeVar

from .errors import ForwardError, TextError
from .values import PORT_MAX, Proto, parse_one_proto

VERSION = 1
# A thousand forwards with everything that a report has about each, two thousand clients, and room to spare.
REPORT_MAX_BYTES = 3 << 20
REASONS_MAX = 32
# docs/behaviours.md, 45: the length of a log line.
TEXT_MAX = 200
# The largest number in a report: signed, of 64 bits.
NUMBER_MAX = 2**63 - 1
_REASON = re.compile(r"[a-z][a-z-]{0,31}\Z", re.ASCII)
_PRINTABLE = re.compile(r"[\x20-\x7e]*\Z", re.ASCII)
_E = TypeVar("_E", bound=StrEnum)
_V = TypeVar("_V")


class ReportError(ForwardError):
    """An answer is no valid report; the text says where, and quotes nothing of it unescaped."""


def load(untrusted_text: bytes) -> object:
    """Parse the JSON of an answer. Raises `ReportError`."""
    import json

    if len(untrusted_text) > REPORT_MAX_BYTES:
        raise ReportError(f"the answer has more than {REPORT_MAX_BYTES} bytes")
    try:
        # Everything that a report may contain is ASCII.
        value: object = json.loads(untrusted_text.decode("ascii"), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise ReportError("the answer is not JSON in ASCII") from None
    return value


def dump(value: Mapping[str, Any]) -> bytes:
    """The document on one line."""
    import json

    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


class Reader:
    """Reads an object in the document, and checks its members as they are read.

    ``place`` says for error messages where the object is. All methods raise `ReportError`.
    """

    def __init__(self, untrusted_value: object, place: str) -> None:
        if not isinstance(untrusted_value, dict):
            raise ReportError(f"{place} must be an object")
        self._untrusted = untrusted_value
        self._place = place

    def check_version(self) -> None:
        version = self.number("version")
        if version != VERSION:
            raise ReportError(
                f"{self._place} is of version {version}, and this program reads {VERSION}; "
                "update the older of the two"
            )

    def number(self, key: str) -> int:
        untrusted = self._member(key)
        if type(untrusted) is not int or not 0 <= untrusted <= NUMBER_MAX:
            raise self._error(key, "a whole number")
        return untrusted

    def port(self, key: str) -> int:
        port = self.number(key)
        if not 1 <= port <= PORT_MAX:
            raise self._error(key, f"a port from 1 to {PORT_MAX}")
        return port

    def flag(self, key: str) -> bool:
        untrusted = self._member(key)
        if not isinstance(untrusted, bool):
            raise self._error(key, "true or false")
        return untrusted

    def text(self, key: str) -> str:
        return self._text(key, self._member(key))

    def texts(self, key: str, most: int) -> tuple[str, ...]:
        return tuple(self._text(key, untrusted) for untrusted in self._list(key, most))

    def word(self, key: str, words: type[_E]) -> _E:
        try:
            return words(self.text(key))
        except ValueError:
            raise self._error(key, f"one of {', '.join(words)}") from None

    def parsed(self, key: str, parse: Callable[[str], _V]) -> _V:
        try:
            return parse(self.text(key))
        except TextError as error:
            raise self._error(key, error.expected) from None

    def counts(self, key: str) -> dict[str, int]:
        inner = self.inner(key)
        if len(inner._untrusted) > REASONS_MAX or not all(map(_REASON.match, inner._untrusted)):
            raise self._error(key, f"at most {REASONS_MAX} words with their numbers")
        return {reason: inner.number(reason) for reason in inner._untrusted}

    def optional(self, key: str, read: Callable[[str], _V]) -> _V | None:
        return None if self._member(key) is None else read(key)

    def given(self, key: str, read: Callable[[str], _V], default: _V) -> _V:
        """A member that an older qube leaves out, or one that has nothing to report."""
        return read(key) if key in self._untrusted else default

    def one_proto(self, key: str) -> Proto:
        """TCP or UDP; TCP if it is not there."""
        return self.given(key, lambda key: self.parsed(key, parse_one_proto), Proto.TCP)

    def several(self, key: str, most: int, read: Callable[["Reader"], _V]) -> tuple[_V, ...]:
        untrusted = self._list(key, most)
        return tuple(read(Reader(entry, f"{self._place}: {key}")) for entry in untrusted)

    def inner(self, key: str) -> "Reader":
        return Reader(self._member(key), f"{self._place}: {key}")

    def _text(self, key: str, untrusted: object) -> str:
        if not isinstance(untrusted, str) or len(untrusted) > TEXT_MAX or not _PRINTABLE.match(untrusted):
            raise self._error(key, f"printable ASCII, at most {TEXT_MAX} characters")
        return untrusted

    def _list(self, key: str, most: int) -> list[object]:
        untrusted = self._member(key)
        if not isinstance(untrusted, list) or len(untrusted) > most:
            raise self._error(key, f"a list of at most {most}")
        return untrusted

    def _member(self, key: str) -> object:
        if key not in self._untrusted:
            raise ReportError(f"{self._place}: {key} is missing")
        return self._untrusted[key]

    def _error(self, key: str, expected: str) -> ReportError:
        return ReportError(f"{self._place}: {key} must be {expected}")
