# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration of one qrexec service, in the subset of TOML that Qubes' agent reads.

Facts: qubes-core-qrexec libqrexec/toml.c. An unknown key is passed over, as there; whatever else is not
right makes the service unusable.
"""

import re
from dataclasses import dataclass
from typing import Self

from qubes_fwd_qrexec.common.errors import TextError

_KEY = re.compile(r"([A-Za-z][A-Za-z0-9._-]*)[ \t]*=[ \t]*", re.ASCII)
_VALUE = re.compile(r"(?:(true|false)|(0|[1-9][0-9]*)|'([^']*)')[ \t]*(?:#.*)?\Z", re.ASCII)
_INTEGER_MAX = 2**64 - 1
_SWITCHES = ("skip-service-descriptor", "exit-on-client-eof", "exit-on-service-eof")


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcConfig:
    """What an agent does differently for a service; the default is a service without configuration."""

    wait_for_session: bool = False
    force_user: str | None = None
    skip_service_descriptor: bool = False
    exit_on_client_eof: bool = False
    exit_on_service_eof: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises `TextError` with the line that the agent would not take."""
        values: dict[str, bool | int | str] = {}
        for line in text.splitlines():
            line = line.rstrip(" \t")
            if not line or line.startswith("#"):
                continue
            key = _KEY.match(line)
            if key is None or "\0" in line:
                raise TextError(line, "KEY=VALUE, with nothing before the key")
            value = _VALUE.match(line, key.end())
            if value is None or line.startswith("'''", key.end()):
                raise TextError(line, "KEY=VALUE with true, false, a whole number or 'text' as the value")
            name = key[1]
            if name in values:
                raise TextError(line, f"right: {name} is set already")
            values[name] = _typed(line, name, value)
        config = cls(
            wait_for_session=bool(values.get("wait-for-session", False)),
            force_user=_as_text(values.get("force-user")),
            skip_service_descriptor=values.get("skip-service-descriptor", False) is True,
            exit_on_client_eof=values.get("exit-on-client-eof", False) is True,
            exit_on_service_eof=values.get("exit-on-service-eof", False) is True,
        )
        if config.force_user is not None and any(values.get(switch) is True for switch in _SWITCHES):
            # libqrexec/exec.c, load_service_config_v2.
            raise TextError("force-user", f"allowed together with {', '.join(_SWITCHES)}")
        return config


def _typed(line: str, name: str, value: re.Match[str]) -> bool | int | str:
    switch, number, text = value.groups()
    if number is not None and int(number) > _INTEGER_MAX:
        raise TextError(line, "a number that the agent can hold")
    if name == "wait-for-session" and number in ("0", "1"):
        return number == "1"
    if name == "wait-for-session" or name in _SWITCHES:
        if switch is None:
            raise TextError(line, f"{name}=true or {name}=false")
        return switch == "true"
    if name == "force-user" and text is None:
        raise TextError(line, "force-user='USER'")
    if switch is not None:
        return switch == "true"
    return int(number) if number is not None else text


def _as_text(value: object) -> str | None:
    return value if isinstance(value, str) else None
