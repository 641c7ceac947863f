# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a qube's configuration comes from, and when it has changed.

Listener and firewall know only `ConfigSource`: `FileSource` reads a directory or a file, `qubesdbsource`
reads QubesDB. What an entry means is decided here, for both.

A directory holds one file for each forward, named by its key (``fwd.work.web`` or ``udp.work.dns`` for the
listener, ``nft.work.web`` for the firewall), with the options on one line, like ``/vm-config/`` in QubesDB. A
file holds the same, one forward on each line: key, space, options. Blank lines and lines that start with
``#`` are ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qubes_fwd_qrexec.common.config import ListenerConfig, is_forward_key
from qubes_fwd_qrexec.common.entries import VALUE_MAX
from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.common.nftconfig import NftConfig, Role, is_nft_key

# A qube's QubesDB has few entries; this bounds how much of a directory full of files is read.
ENTRIES_MAX = 4096
FILE_MAX = 1 << 20
_BLANKS = " \t\r"


@dataclass(frozen=True, slots=True)
class Configuration:
    """What was read: ``forwards`` for the listener, and ``paths`` for the firewall, by their keys.

    ``errors`` and ``path_errors`` say of each entry that cannot be read why, by its key.
    """

    forwards: dict[str, ListenerConfig] = field(default_factory=dict)
    errors: dict[str, ConfigError] = field(default_factory=dict)
    paths: dict[str, NftConfig] = field(default_factory=dict)
    path_errors: dict[str, ConfigError] = field(default_factory=dict)


class ConfigSource(Protocol):
    """A source of configuration. None of these methods blocks."""

    @property
    def problem(self) -> str | None:
        """Why nothing new can be read from it at the moment; None if something can."""

    def read(self) -> Configuration:
        """Return what is configured now. Raises `ConfigError` if the source itself cannot be read."""

    def stamp(self) -> object:
        """A value that changes when `read` may return something new."""

    def refresh(self, done: Callable[[], None]) -> None:
        """Make `stamp` and `read` know of all that was configured before; then ``done`` is called, perhaps by
        another thread.
        """


class FileSource:
    """A directory or a file; see the module's docstring."""

    def __init__(self, path: Path) -> None:
        self.problem: str | None = None
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def read(self) -> Configuration:
        """Read everything afresh. Raises `ConfigError` if the directory or file cannot be read."""
        try:
            entries = self._entries()
        except ConfigError as error:
            self.problem = str(error)
            raise
        self.problem = None
        return parse_entries(entries)

    def stamp(self) -> object:
        """The names, sizes and times of the files."""
        try:
            if not self._path.is_dir():
                return _stamp(self._path)
            files = [file for file in self._path.iterdir() if is_ours(file.name)]
            return sorted((file.name, _stamp(file)) for file in files)
        except OSError:
            return None

    def refresh(self, done: Callable[[], None]) -> None:
        """They look at the files themselves."""
        done()

    def _entries(self) -> dict[str, str | ConfigError]:
        try:
            if not self._path.is_dir():
                text = _text(self._path, FILE_MAX)
                if len(text) > FILE_MAX:
                    raise ConfigError(f"{self._path}: more than {FILE_MAX} bytes; so many are read")
                return _line_entries(text)
            files = sorted(file for file in self._path.iterdir() if is_ours(file.name))
            if len(files) > ENTRIES_MAX:
                raise ConfigError(f"{self._path}: {len(files)} entries; at most {ENTRIES_MAX} are read")
            entries = {file.name: _value(file) for file in files}
        except OSError as error:
            raise ConfigError(f"{self._path}: {error.strerror}") from error
        return {key: value for key, value in entries.items() if value is not None}


def is_ours(key: str) -> bool:
    """Whether an entry of ``/vm-config/`` is for a listener or a firewall."""
    return is_forward_key(key) or is_nft_key(key)


def parse_entries(entries: Mapping[str, str | ConfigError], own_name: str | None = None) -> Configuration:
    """Parse entries, by their keys. A bad one is an error of its own, as is one that could not be read.

    ``own_name`` is the qube's, if that is known: until dom0 takes them away, a clone or a disposable has the
    entries of the target that it was made from, and is not that target.
    """
    found = Configuration()
    for key, untrusted_value in entries.items():
        is_path = is_nft_key(key)
        try:
            if isinstance(untrusted_value, ConfigError):
                raise untrusted_value
            if is_path:
                found.paths[key] = _for_qube(NftConfig.parse(key, untrusted_value), own_name)
            else:
                found.forwards[key] = ListenerConfig.parse(key, untrusted_value)
        except ConfigError as error:
            (found.path_errors if is_path else found.errors)[key] = error
    return found


def _for_qube(config: NftConfig, own_name: str | None) -> NftConfig:
    if config.role is Role.TARGET and own_name not in (None, config.target):
        raise ConfigError(f"{config.key}: it is for {config.target}, and this qube is {own_name!a}")
    return config


def _text(path: Path, size_max: int) -> str:
    """At most ``size_max`` + 1 bytes. Latin-1 decodes any byte; what is not ASCII is refused later."""
    with path.open("rb") as file:
        return file.read(size_max + 1).decode("latin-1")


def _value(path: Path) -> str | ConfigError | None:
    """One entry of a directory; None if it was removed since the directory was read."""
    try:
        value = _text(path, VALUE_MAX + 1).removesuffix("\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        return ConfigError(f"entry {path.name!a}: {error.strerror}")
    if len(value) > VALUE_MAX:
        return ConfigError(f"entry {path.name!a}: longer than the {VALUE_MAX} bytes that QubesDB takes")
    return value


def _line_entries(text: str) -> dict[str, str | ConfigError]:
    """Split at newlines alone: other control characters do not end lines, but are errors in them."""
    entries: dict[str, str | ConfigError] = {}
    for line in text.split("\n"):
        key, _, value = line.strip(_BLANKS).partition(" ")
        if key and not key.startswith("#"):
            twice = ConfigError(f"entry {key!a} is there twice; one of them would be right")
            entries[key] = twice if key in entries else value.strip(_BLANKS)
    return entries


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
