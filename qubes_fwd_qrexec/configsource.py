# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a listener's configuration comes from, and when it has changed.

A directory holds one file for each forward, named by its key (``fwd.work.web``), with its options on
one line: the shape of ``/vm-config/`` in QubesDB. A file holds the same, one forward a line:
key, space, options. Blank lines and lines that start with ``#`` are passed over.
"""

from pathlib import Path
from typing import NamedTuple

from .config import VALUE_MAX, ListenerConfig, is_forward_key
from .errors import ConfigError
from .values import QubeName, RuleName

# A qube's QubesDB holds few entries; this bounds what a directory full of files can make us read.
_ENTRIES_MAX = 4096


class Configuration(NamedTuple):
    """What was found: the forwards that can be read, and an error for each entry that cannot."""

    forwards: dict[tuple[QubeName, RuleName], ListenerConfig]
    errors: dict[str, ConfigError]


class ConfigSource:
    """A directory or file of configurations."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def read(self) -> Configuration:
        """Read everything afresh. Raises `ConfigError` when the source itself cannot be read."""
        forwards: dict[tuple[QubeName, RuleName], ListenerConfig] = {}
        errors: dict[str, ConfigError] = {}
        for key, untrusted_value in self._entries().items():
            try:
                config = ListenerConfig.parse(key, untrusted_value)
            except ConfigError as error:
                errors[key] = error
            else:
                forwards[config.target, config.name] = config
        return Configuration(forwards, errors)

    def stamp(self) -> object:
        """A value that differs when something changed since: names, sizes and times of the files."""
        try:
            if not self._path.is_dir():
                return _stamp(self._path)
            files = [file for file in self._path.iterdir() if is_forward_key(file.name)]
            return sorted((file.name, _stamp(file)) for file in files)
        except OSError:
            return None

    def _entries(self) -> dict[str, str]:
        try:
            if not self._path.is_dir():
                return dict(_line_entries(_text(self._path)))
            files = sorted(file for file in self._path.iterdir() if is_forward_key(file.name))
            if len(files) > _ENTRIES_MAX:
                raise ConfigError(f"{self._path}: {len(files)} entries; at most {_ENTRIES_MAX} are read")
            return {file.name: _text(file).rstrip("\n") for file in files}
        except OSError as error:
            raise ConfigError(f"{self._path}: {error.strerror}") from error


def _text(path: Path) -> str:
    """Latin-1 reads any byte; what is not ASCII is then refused where it stands."""
    with path.open("rb") as file:
        return file.read(_ENTRIES_MAX * VALUE_MAX).decode("latin-1")


def _line_entries(text: str) -> list[tuple[str, str]]:
    lines = (line.strip() for line in text.splitlines())
    entries = (line.partition(" ") for line in lines if line and not line.startswith("#"))
    return [(key, value.strip()) for key, _, value in entries]


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
