# SPDX-License-Identifier: GPL-2.0-or-later
"""The knobs of a lab: how its qrexec is made to misbehave, so that programs can be tried under it.

They are a checked value of ``lab.json``, which the broker obeys from the next call on. Losing calls in
mid-stream is an act and not a state: `qubes_fwd_qrexec.lab.control` has it.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

from qubes_fwd_qrexec.common.errors import StoreError, TextError
from qubes_fwd_qrexec.common.values import parse_number

# docs/facts.md, Q1. Stock 4.3 manages 10 to 25: Q5.
CALLS_PER_TARGET = 127
# docs/facts.md, Q2.
VCHANS_PER_CALLER = 30
_LATENCY_MAX_MS = 600_000
_CALLS_MAX = 65_535
PATIENCE_MAX = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """How calls fare. The lists hold ``TARGET`` or ``TARGET/SERVICE``, either of which may be ``*``.

    ``vchans_per_caller`` counts vchans of the default buffer size, over all targets; ``begun_at_once`` are
    those of one caller that have been allowed and not yet connected (0: no bound, else as many as a qube of
    Qubes 4.3 manages). A call of ``refuse`` gets 126 and one of ``hang`` no answer from dom0. One of ``park``
    is allowed, and then its caller leaves the data connection's handshake unanswered until the knob is
    turned back. dom0 waits ``patience`` times as long for answers as on Qubes: all qubes of a lab have the
    processors of one machine, which may be busy with other work.
    """

    calls_per_target: int = CALLS_PER_TARGET
    vchans_per_caller: int = VCHANS_PER_CALLER
    begun_at_once: int = 0
    latency_ms: int = 0
    refuse: tuple[str, ...] = ()
    hang: tuple[str, ...] = ()
    park: tuple[str, ...] = ()
    patience: int = 1

    def __post_init__(self) -> None:
        for count in (self.calls_per_target, self.vchans_per_caller, self.begun_at_once):
            if not 0 <= count <= _CALLS_MAX:
                raise TextError(str(count), f"a number of calls: 0 to {_CALLS_MAX}")
        if not 0 <= self.latency_ms <= _LATENCY_MAX_MS:
            raise TextError(str(self.latency_ms), f"a latency in milliseconds: 0 to {_LATENCY_MAX_MS}")
        if not 1 <= self.patience <= PATIENCE_MAX:
            raise TextError(str(self.patience), f"how many times as long: 1 to {PATIENCE_MAX}")
        for pattern in (*self.refuse, *self.hang, *self.park):
            if not pattern or " " in pattern or pattern.count("/") > 1:
                raise TextError(pattern, "TARGET or TARGET/SERVICE, where * stands for any")

    @classmethod
    def parse(cls, data: object, place: str) -> Self:
        """From the JSON object under ``knobs``; raises `StoreError` that names ``place`` and the knob."""
        if not isinstance(data, dict):
            raise StoreError(f"{place}: 'knobs' must be an object")
        found: dict[str, Any] = {}
        for name, value in data.items():
            if name not in KNOBS:
                raise StoreError(f"{place}: unknown knob {name!a}; there are {', '.join(KNOBS)}")
            if name in _LISTS:
                if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                    raise StoreError(f"{place}: knob {name!a} must be a list of strings")
                found[name] = tuple(value)
            else:
                if not isinstance(value, int) or isinstance(value, bool):
                    raise StoreError(f"{place}: knob {name!a} must be a whole number")
                found[name] = value
        try:
            return cls(**found)
        except TextError as error:
            raise StoreError(f"{place}: {error}") from error

    def with_text(self, name: str, text: str) -> Self:
        """One knob set from text: a number, or a comma-separated list (empty: none). Raises `TextError`."""
        self.value(name)
        value: Any = tuple(filter(None, text.split(","))) if name in _LISTS else parse_number(text)
        return replace(self, **{name: value})

    def value(self, name: str) -> object:
        """One knob, as in `as_json`. Raises `TextError`."""
        if name not in KNOBS:
            raise TextError(name, f"a knob: one of {', '.join(KNOBS)}")
        return self.as_json()[name]

    def as_json(self) -> dict[str, object]:
        """All knobs, in the form that `parse` reads."""
        return {
            name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in KNOBS
        }

    def refuses(self, target: str, service: str) -> bool:
        return any(_fits(pattern, target, service) for pattern in self.refuse)

    def hangs(self, target: str, service: str) -> bool:
        return any(_fits(pattern, target, service) for pattern in self.hang)

    def parks(self, target: str, service: str) -> bool:
        return any(_fits(pattern, target, service) for pattern in self.park)


KNOBS = tuple(field.name for field in fields(Knobs))
_LISTS = ("refuse", "hang", "park")


def _fits(pattern: str, target: str, service: str) -> bool:
    """Whether ``SERVICE`` in the pattern is ``service`` itself, or its name before the ``+``."""
    wanted_target, _, wanted_service = pattern.partition("/")
    return wanted_target in ("*", target) and wanted_service in ("", "*", service, service.partition("+")[0])
