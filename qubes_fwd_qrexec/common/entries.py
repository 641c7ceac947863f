# SPDX-License-Identifier: GPL-2.0-or-later
"""Entries of ``/vm-config/`` in QubesDB, by which dom0 tells a qube of its forwards.

An entry's name is ``KIND.TARGET.NAME``, and its value a line of options that begins with its version. dom0
writes each as feature ``vm-config.KIND.TARGET.NAME`` of the qube, and Qubes carries it to the qube.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from . import values
from .errors import ConfigError, RuleError, TextError
from .options import Form, read, split
from .values import QubeName, RuleName

VERSION = 1
# Names of vm-config features have at most 52 characters: docs/facts.md, A2.
KEY_MAX = 52
# A value in QubesDB has at most 3071 bytes; a larger one can keep a qube from starting: docs/facts.md, A3.
VALUE_MAX = 3071


def parse_key(kind: str, key: str) -> tuple[QubeName, RuleName]:
    """The target and the rule in ``KIND.TARGET.NAME``; rule names have no dot. Raises `ConfigError`."""
    prefix = f"{kind}."
    target, _, name = key.removeprefix(prefix).rpartition(".")
    try:
        if not key.startswith(prefix):
            raise TextError(key, f"{prefix}TARGET.NAME")
        return values.parse_qube_name(target), values.parse_rule_name(name)
    except TextError as error:
        raise ConfigError(f"entry {key!a}: {error}") from None


def parse_value(
    key: str, untrusted_value: str, forms: Mapping[str, Form], required: Collection[str]
) -> dict[str, Any]:
    """The fields that an entry's options fill. Raises `ConfigError` that names the key and the option."""
    _check_version(key, untrusted_value)
    known = {"version": Form("version", values.parse_number), **forms}
    try:
        options = list(split(untrusted_value))
        newer = [option for option in options if option.name not in known]
        if newer:
            raise ConfigError(
                f"{key}: {newer[0].place}: unknown option; if dom0's package is newer than this qube's, "
                f"update this qube's template. Known are {', '.join(known)}"
            )
        given = read(options, known)
    except RuleError as error:
        raise ConfigError(f"{key}: {error}") from None
    if given.pop("version", None) != VERSION:
        raise ConfigError(f"{key}: option 'version' is missing; this qube reads version={VERSION}")
    for option in required:
        if forms[option].field not in given:
            raise ConfigError(f"{key}: option {option!r} is missing")
    return given


def _check_version(key: str, untrusted_value: str) -> None:
    """Check the version before anything else: in another version every word may have another meaning."""
    versions = [word for word in untrusted_value.split(" ") if word.startswith("version=")]
    if versions and versions[0] != f"version={VERSION}":
        raise ConfigError(
            f"{key}: {versions[0][:32]!a}, written for another version; this qube reads "
            f"version={VERSION}. dom0's package and this qube's may be one release apart, and no more"
        )


def print_value(config: Any, forms: Mapping[str, Form], required: Collection[str]) -> str:
    """The line of a configuration, a dataclass; fields that have their default are left out."""
    return " ".join((f"version={VERSION}", *_options(config, forms, required)))


def _options(config: Any, forms: Mapping[str, Form], required: Collection[str]) -> Iterator[str]:
    known = config.__dataclass_fields__
    for option, form in forms.items():
        value = getattr(config, form.field)
        if option in required or value != known[form.field].default:
            yield f"{option}={form.print(value)}"


def check_size(key: str, value: str) -> None:
    """Raises `ConfigError` if a value does not fit into QubesDB."""
    if len(value) > VALUE_MAX:
        raise ConfigError(
            f"{key}: the configuration has {len(value)} bytes and QubesDB takes {VALUE_MAX}; "
            "name fewer or larger networks in srchosts"
        )
