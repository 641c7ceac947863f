# SPDX-License-Identifier: GPL-2.0-or-later
"""One qube of a lab, as ``qube.json`` holds it: a checked value that prints what it was read from."""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Self, TypeVar

from qubes_fwd_qrexec.common.errors import StoreError, TextError
from qubes_fwd_qrexec.common.values import QubeName, parse_address, parse_qube_name

_E = TypeVar("_E", bound=StrEnum)


class QubeClass(StrEnum):
    """The classes of qubes-core-admin qubes/vm/."""

    APP = "AppVM"
    DISPOSABLE = "DispVM"
    TEMPLATE = "TemplateVM"
    STANDALONE = "StandaloneVM"
    ADMIN = "AdminVM"


class QubeState(StrEnum):
    """The two power states that a lab needs, by the names of ``vm.get_power_state()``."""

    RUNNING = "Running"
    HALTED = "Halted"


LABELS = ("red", "orange", "yellow", "green", "gray", "blue", "purple", "black")
"""The colours that Qubes has from the start."""
# qubes-core-admin qubes/vm/__init__.py, appvm.py, adminvm.py
_ICONS = {
    QubeClass.ADMIN: "adminvm",
    QubeClass.TEMPLATE: "templatevm",
    QubeClass.DISPOSABLE: "dispvm",
    QubeClass.STANDALONE: "standalonevm",
}

_KEYS: dict[str, type | tuple[type, ...]] = {
    "klass": str,
    "netvm": (str, type(None)),
    "ip": (str, type(None)),
    "ip6": (str, type(None)),
    "state": str,
    "provides_network": bool,
    "template": (str, type(None)),
    "template_for_dispvms": bool,
    "tags": list,
    "label": str,
}
# What a lab that an earlier release has made does not say.
_NEW = {"label": "red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Qube:
    """A qube's properties. Other qubes are named, never embedded, so that a name may dangle."""

    name: QubeName
    klass: QubeClass = QubeClass.APP
    netvm: QubeName | None = None
    ip: str | None = None
    ip6: str | None = None
    state: QubeState = QubeState.RUNNING
    provides_network: bool = False
    template: QubeName | None = None
    template_for_dispvms: bool = False
    tags: tuple[str, ...] = ()
    label: str = "red"

    @property
    def is_running(self) -> bool:
        return self.state is QubeState.RUNNING

    @property
    def is_admin(self) -> bool:
        return self.klass is QubeClass.ADMIN

    @property
    def icon(self) -> str:
        """The name of its icon, as Qubes makes it."""
        kind = _ICONS.get(self.klass, "appvm")
        if self.template_for_dispvms:
            kind = "templatevm"
        elif self.provides_network and self.klass is not QubeClass.TEMPLATE:  # it has the feature servicevm
            kind = "servicevm"
        return f"{kind}-{self.label}"

    @classmethod
    def parse(cls, name: str, text: str, place: str) -> Self:
        """The qube ``name`` from JSON text; raises `StoreError` that names ``place`` and the key."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise StoreError(f"{place}: not JSON: {error}") from error
        if not isinstance(data, dict):
            raise StoreError(f"{place}: must be an object with the keys {', '.join(_KEYS)}")
        data = {**_NEW, **data}
        for key in data:
            if key not in _KEYS:
                raise StoreError(f"{place}: unknown key {key!a}; known are {', '.join(_KEYS)}")
        for key, kind in _KEYS.items():
            if key not in data:
                raise StoreError(f"{place}: the key {key!a} is missing")
            if not isinstance(data[key], kind):
                raise StoreError(f"{place}: {key!a} is {data[key]!r}, which has the wrong type")
        if not all(isinstance(tag, str) for tag in data["tags"]):
            raise StoreError(f"{place}: 'tags' must be a list of strings")
        try:
            for key in ("ip", "ip6"):
                if data[key] is not None:
                    parse_address(data[key])
            return cls(
                name=parse_qube_name(name),
                klass=_member(QubeClass, data["klass"]),
                netvm=_optional_name(data["netvm"]),
                ip=data["ip"],
                ip6=data["ip6"],
                state=_member(QubeState, data["state"]),
                provides_network=data["provides_network"],
                template=_optional_name(data["template"]),
                template_for_dispvms=data["template_for_dispvms"],
                tags=tuple(data["tags"]),
                label=data["label"],
            )
        except TextError as error:
            raise StoreError(f"{place}: {error}") from error

    def __str__(self) -> str:
        """The text of ``qube.json``; `parse` reads it back to an equal value."""
        data = {key: getattr(self, key) for key in _KEYS} | {"tags": list(self.tags)}
        return json.dumps(data, indent=2) + "\n"


def _optional_name(text: str | None) -> QubeName | None:
    return None if text is None else parse_qube_name(text)


def _member(kind: type[_E], text: str) -> _E:
    try:
        return kind(text)
    except ValueError:
        raise TextError(text, f"one of {', '.join(kind)}") from None
