# SPDX-License-Identifier: GPL-2.0-or-later
"""What would mend a draft: other options, a field to fill, or a command to run elsewhere."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.admin.views.reasons import Command
from qubes_fwd_qrexec.common.options import Option

from .draft import Draft
from .words import _

# What `reasons` leaves to the user to fill in.
_BLANKS = frozenset(("QUBE", "NETVM", "PORTS", "NETWORKS", "ADDRESS", "PORT"))
# By two options that contradict each other, what ends that.
_CONTRADICTIONS: Mapping[tuple[str, ...], tuple[tuple[str, str], ...]] = {
    ("srchosts", "forwardtype"): (("forwardtype", "internal"),),
    ("mode", "transport"): (("transport", "auto"), ("mode", "qrexec")),
    ("mode", "proxy"): (("mode", "qrexec"), ("proxy", "off")),
    ("mode", "autostart"): (("mode", "qrexec"), ("autostart", "no")),
    ("transport", "proxy"): (("transport", "mux"), ("proxy", "off")),
    ("proto", "proxy"): (("proxy", "v2"),),
    ("proto", "transport"): (("transport", "auto"),),
    ("listen", "srchosts"): (("listen", ""),),
}


def is_blank(value: str) -> bool:
    """Whether a way out leaves it to the user what to give an option."""
    return value in _BLANKS


class Mend(NamedTuple):
    """One thing that would help, and the words for its button: to give the draft ``options``, to begin with
    another ``draft``, to go on with ``field``, or to run ``command``, which this window does not.
    """

    label: str
    options: tuple[Option, ...] = ()
    draft: Draft | None = None
    field: str = ""
    command: str = ""


def of_contradiction(options: tuple[str, ...]) -> Iterator[Mend]:
    """What ends a contradiction between two options."""
    for name, value in _CONTRADICTIONS.get(options, ()):
        yield _setting(name, value)


def of_ways_out(key: Key, commands: Iterable[Command]) -> tuple[Mend, ...]:
    """What a draft of the rule ``key`` can make of the ways out of its state. That its tunnel may be bypassed
    is a field which the user is asked by itself, and what only removes or enables it is none.
    """
    return tuple(mend for command in commands for mend in _of_way_out(key, command))


def _of_way_out(key: Key, command: Command) -> Iterator[Mend]:
    program, *rest = command
    if program != "qvm-forward" or tuple(rest[1:3]) != key:
        yield Mend(_("Copy “{command}”").format(command=" ".join(command)), command=" ".join(command))
    elif rest[0] == "set":
        for text in rest[3:]:
            name, _equals, value = text.partition("=")
            if is_blank(value):
                yield Mend(filling_label(name), field=name)
            elif name != "bypass-tunnel" or value != "yes":
                yield _setting(name, value)


def _setting(name: str, value: str) -> Mend:
    return Mend(setting_label(name, value), (Option(name, value, name),), field=name)


def setting_label(name: str, value: str) -> str:
    """What giving an option a value does, for a button."""
    known = {
        "mode=qrexec": _("Send it over qrexec"),
        "mode=nft": _("Send it by nft"),
        "forwardtype=internal": _("Expose it only to other qubes"),
        "via=": _("Expose it at one of its own netvms"),
        "transport=auto": _("Choose the transport automatically"),
        "transport=mux": _("Use mux calls"),
        "proxy=off": _("Send no PROXY header"),
        "proxy=v2": _("Use PROXY version 2"),
        "autostart=yes": _("Let connections start the qube"),
        "autostart=no": _("Do not let connections start the qube"),
        "follow-netvm=yes": _("Follow the netvm"),
        "bypass-tunnel=yes": _("Bypass the tunnel"),
        "bypass-tunnel=no": _("Do not bypass the tunnel"),
        "listen=": _("Listen on every address"),
        "expire=+8h": _("End it in 8 hours"),
    }
    if name == "via" and value:
        return _("Expose it at {qube}").format(qube=value)
    return known.get(f"{name}={value}", f"{name}={value}")


def filling_label(name: str) -> str:
    """What filling in an option does, for a button."""
    known = {
        "via": _("Expose it at another qube…"),
        "srcports": _("Use another exposed port…"),
        "dstports": _("Use another server port…"),
        "srchosts": _("Let in others…"),
        "listen": _("Listen on another address…"),
    }
    return known.get(name, f"{name}=…")
