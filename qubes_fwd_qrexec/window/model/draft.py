# SPDX-License-Identifier: GPL-2.0-or-later
"""A rule as the fields of Add and Edit hold it: texts as they were typed, which may be wrong or missing.

A draft becomes options as `add` and `set` of the command line have them. Nothing is checked here: see
`judgement`.
"""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self

from qubes_fwd_qrexec.admin.views.times import parse_expire
from qubes_fwd_qrexec.common.errors import RuleError, TextError
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.rules import ForwardType, Mode, NamedRule, OnExpire, Proxy, Transport
from qubes_fwd_qrexec.common.values import Proto, yes_no

QUBE, NAME = "qube", "name"
"""The fields that are no option of a rule; the others have its options' names."""
PRESETS = ("192.168.0.0/16", "10.0.0.0/8", "172.16.0.0/12", "fd00::/8")
"""The private networks, in which LANs are."""
ANYBODY = "any"
_BETWEEN = re.compile(r"[,;\s]+")


class Where(StrEnum):
    """At which qube the forward is exposed."""

    OUTERMOST = "outermost"
    NETVM = "netvm"
    OTHER = "other"


class Ends(StrEnum):
    """When it ends: after a span of time, at a time that is given, or never. The words are those of times."""

    MINUTES_5 = "5m"
    HOUR = "1h"
    HOURS_8 = "8h"
    UNTIL = "until"
    NEVER = "never"


_SPANS = (Ends.MINUTES_5, Ends.HOUR, Ends.HOURS_8)


@dataclass(frozen=True, slots=True)
class Draft:
    """What the fields hold. ``base`` is the stored rule that is changed, None for a new one.

    ``ports`` are those of the server, ``exposed_ports`` those at the exposed qube, empty if the same.
    ``is_inside``: at another qube, for those behind it alone. ``sources`` are ignored if ``is_anybody``.
    """

    base: NamedRule | None = None
    target: str = ""
    ports: str = ""
    proto: str = Proto.TCP.value
    where: Where = Where.OUTERMOST
    via: str = ""
    is_inside: bool = False
    exposed_ports: str = ""
    is_anybody: bool = False
    sources: str = ""
    ends: Ends = Ends.HOUR
    until: str = ""
    comment: str = ""
    name: str = ""
    mode: str = Mode.AUTO.value
    transport: str = Transport.AUTO.value
    proxy: str = Proxy.OFF.value
    limits: str = ""
    listen: str = ""
    autostart: bool = False
    on_expire: str = OnExpire.CUT.value
    follow_netvm: bool = False
    bypass_tunnel: bool = False

    @classmethod
    def of(cls, named: NamedRule) -> Self:
        """The fields of a stored rule."""
        rule = named.rule
        draft = cls(named, named.target, rule.target_ports.brief(), name=named.name, ends=Ends.NEVER)
        options = (Option(name, text, name) for name, text in rule.options().items() if name != "dstports")
        return draft.with_options(options)

    def with_options(self, options: Iterable[Option]) -> Self:
        """The same with some options of a rule, such as a way out asks for; an empty text is the default.
        Those without a field change nothing.
        """
        draft = self
        for name, text, _ in options:
            draft = draft._with_option(name, text)
        return draft

    def _with_option(self, name: str, text: str) -> Self:
        match name:
            case "via" if text:
                return replace(self, where=Where.OTHER, via=text, is_inside=self.is_internal)
            case "via":
                where = Where.NETVM if self.is_internal else Where.OUTERMOST
                return replace(self, where=where, via="", is_inside=False)
            case "forwardtype" if self.where is Where.OTHER:
                return replace(self, is_inside=text == ForwardType.INTERNAL)
            case "forwardtype":
                is_internal = text == ForwardType.INTERNAL
                return replace(self, where=Where.NETVM if is_internal else Where.OUTERMOST)
            case "srcports":
                ports = _brief(text)
                return replace(self, exposed_ports="" if ports == self.ports else ports)
            case "dstports":
                ports, exposed = _brief(text), self.exposed_ports or self.ports
                return replace(self, ports=ports, exposed_ports="" if ports == exposed else exposed)
            case "srchosts" if text == ANYBODY:
                return replace(self, is_anybody=True)
            case "srchosts":
                return replace(self, is_anybody=False, sources=text.replace(",", ", "))
            case "expire":
                return self._with_end(text)
            case "autostart" | "follow-netvm" | "bypass-tunnel":
                return self._with(name, text == yes_no(True))
            case "proto" | "mode" | "transport" | "proxy" | "on-expire" | "comment" | "limits" | "listen":
                return self._with(name, text or getattr(_EMPTY, _field(name)))
        return self

    def _with(self, name: str, value: object) -> Self:
        fields: dict[str, Any] = {_field(name): value}
        return replace(self, **fields)

    def _with_end(self, text: str) -> Self:
        span = text.removeprefix("+")
        if text in ("", Ends.NEVER):
            return replace(self, ends=Ends.NEVER)
        if span in _SPANS:
            return replace(self, ends=Ends(span))
        return replace(self, ends=Ends.UNTIL, until=clock_text(int(text)) if text.isdigit() else text)

    def with_source(self, source: str, *, is_in: bool) -> Self:
        """The same with one more network or name that may connect, or without it."""
        if is_in is (source in self.source_list):
            return self
        others = [each for each in self.source_list if each != source]
        return replace(self, sources=", ".join([*others, source] if is_in else others))

    def rebased(self, base: NamedRule | None) -> Self:
        """The same fields, for what is stored now; for a new rule if there is none any more."""
        return replace(self, base=base)

    @property
    def is_internal(self) -> bool:
        """Whether it is for other qubes alone."""
        return self.where is Where.NETVM or (self.where is Where.OTHER and self.is_inside)

    @property
    def source_list(self) -> list[str]:
        """The networks and names that were typed."""
        return _parts(self.sources)

    @property
    def missing(self) -> tuple[str, ...]:
        """The fields that have to be filled and are empty."""
        needed = {
            QUBE: self.target.strip(),
            "dstports": self.ports.strip(),
            "via": self.where is not Where.OTHER or self.via.strip(),
            "srchosts": self.is_anybody or self.source_list,
            "expire": self.ends is not Ends.UNTIL or self.until.strip(),
        }
        return tuple(field for field, is_filled in needed.items() if not is_filled)

    def options(self, now: float) -> list[Option]:
        """What `add` is asked for; of a stored rule only what differs from that, as `set` takes it. ``now``
        in UNIX seconds. Raises `RuleError` if the end cannot be read.
        """
        if self.base is None:
            given = {"action": "forward", **self._texts(), "expire": self._end(now)}
            return [Option(name, text, name) for name, text in given.items() if text]
        was = Draft.of(self.base)
        texts, old_texts = self._texts(), was._texts()
        if (self.ends, self.until) != (was.ends, was.until):
            texts["expire"] = self._end(now)
        return [Option(name, text, name) for name, text in texts.items() if text != old_texts.get(name)]

    def _texts(self) -> dict[str, str]:
        """All options but the end; an empty one has its default."""
        ports = self.ports.strip()
        return {
            "mode": self.mode,
            "forwardtype": (ForwardType.INTERNAL if self.is_internal else ForwardType.EXTERNAL).value,
            "via": self.via.strip() if self.where is Where.OTHER else "",
            "proto": self.proto,
            "srcports": self.exposed_ports.strip() or ports,
            "dstports": ports,
            "srchosts": ANYBODY if self.is_anybody else ",".join(self.source_list),
            "listen": self.listen.strip(),
            "transport": self.transport,
            "proxy": self.proxy,
            "autostart": "yes" if self.autostart else "",
            "on-expire": self.on_expire,
            "follow-netvm": "yes" if self.follow_netvm else "",
            "bypass-tunnel": "yes" if self.bypass_tunnel else "",
            "limits": self.limits.strip(),
            "comment": self.comment.strip(),
        }

    def _end(self, now: float) -> str:
        """UNIX seconds, or empty for never."""
        try:
            end = parse_expire(self.until.strip() if self.ends is Ends.UNTIL else self.ends, now)
        except TextError as error:
            raise RuleError("option 'expire'", str(error), "expire") from None
        return "" if end is None else str(end)


_EMPTY = Draft()


def _field(option: str) -> str:
    return option.replace("-", "_")


def clock_text(seconds: int) -> str:
    """A time as the field for it shows and reads it: local, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _parts(text: str) -> list[str]:
    return [part for part in _BETWEEN.split(text) if part]


def _brief(ports: str) -> str:
    """``80`` for ``80-80``."""
    first, _, last = ports.partition("-")
    return first if first == last else ports
