# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab's directory: where things lie in it, and how to read and change them.

It is the lab's inventory, features and QubesDB, which ``qvm-forward`` reads and writes as it does dom0's;
so this module needs the standard library alone and is quick to import. It starts nothing and knows nothing
of the broker.

Each write goes to a temporary file that is then renamed, so a reader sees the old or the new value. Whoever
reads and then writes holds `LabDirectory.locked`.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qubes_fwd_qrexec.common.entries import KEY_MAX, VALUE_MAX
from qubes_fwd_qrexec.common.errors import StoreError, TextError, why
from qubes_fwd_qrexec.common.values import QubeName, parse_printable, parse_qube_name

from .knobs import Knobs
from .qube import Qube, QubeState

VERSION = 1
LAB_FILE = "lab.json"
QUBE_FILE = "qube.json"
# How the name of a delivered feature begins: docs/facts.md, A2.
DELIVERED_PREFIX = "vm-config."
# The order in which an agent looks for a service and its configuration: docs/facts.md, S1.
SEARCH_ROOTS = ("run", "usr-local-etc", "etc")
# docs/facts.md, A1; but a leading dot is for files that are being written.
_FEATURE_NAME = re.compile(r"[a-zA-Z0-9_-][a-zA-Z0-9_.-]*\Z", re.ASCII)
# qubes-core-admin qubes/api/__init__.py, buffer_size: a request of the Admin API as a whole.
_REQUEST_MAX = 65536
LOCK_TIMEOUT_S = 10.0
"""How long a writer waits for another one."""
_LOCK_RETRY_S = 0.02


@dataclass(frozen=True, slots=True)
class QubeDirectory:
    """The paths of one qube."""

    root: Path

    @property
    def file(self) -> Path:
        return self.root / QUBE_FILE

    @property
    def features(self) -> Path:
        return self.root / "features"

    @property
    def vm_config(self) -> Path:
        """What the qube's QubesDB has under ``/vm-config``, one file for each key."""
        return self.root / "vm-config"

    @property
    def service_dirs(self) -> tuple[Path, ...]:
        """In the order of the search."""
        return tuple(self.root / root / "qubes-rpc" for root in SEARCH_ROOTS)

    @property
    def rpc_config_dirs(self) -> tuple[Path, ...]:
        """In the order of the search."""
        return tuple(self.root / root / "qubes" / "rpc-config" for root in SEARCH_ROOTS)

    @property
    def servers_files(self) -> tuple[Path, ...]:
        """Where the qube's owner names servers that are not at localhost; and where its template's does."""
        return tuple(self.root / root / "qubes-forward" / "servers.conf" for root in SEARCH_ROOTS[1:])

    @property
    def listener_run(self) -> Path:
        """The runtime directory of the qube's listener."""
        return self.root / "run" / "listener"

    @property
    def single_calls_socket(self) -> Path:
        """Where calls for one connection are handed over to one process, if one runs."""
        return self.root / "run" / "forward.socket"

    @property
    def firewall_run(self) -> Path:
        """The runtime directory of the program that keeps the qube's firewall."""
        return self.root / "run" / "firewall"

    @property
    def firewall_state(self) -> Path:
        """What that program says of what it lets in to the listener."""
        return self.firewall_run / "state"

    @property
    def agent_socket(self) -> Path:
        return self.root / "qrexec.sock"


class NoLabError(StoreError):
    """There is no lab at ``lab.root``, or none any more."""

    def __init__(self, lab: "LabDirectory") -> None:
        super().__init__(
            f"{lab.root}: not a lab: {LAB_FILE} is missing; 'qvm-forward-lab init DIR' makes one"
        )
        self.lab = lab


@dataclass(frozen=True, slots=True)
class LabDirectory:
    """A lab's directory; `open` checks that it is one. ``root`` is absolute."""

    root: Path

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "LabDirectory":
        """The lab at ``path``; raises `StoreError` if there is none, or one of another version."""
        lab = cls(Path(path).absolute())
        try:
            owner = lab.root.stat().st_uid
        except OSError:
            owner = None
        if owner not in (None, os.geteuid()) and os.geteuid() != 0 and _may_be_lab(lab):
            raise StoreError(f"{lab.root}: a lab of the user {_user_name(owner)}, which only they can use")
        lab.knobs()
        if not lab.qubes_dir.is_dir():
            raise StoreError(f"{lab.qubes_dir}: missing; 'qvm-forward-lab init DIR' makes a whole lab")
        return lab

    @property
    def file(self) -> Path:
        return self.root / LAB_FILE

    @property
    def policy_dir(self) -> Path:
        return self.root / "policy.d"

    @property
    def qubes_dir(self) -> Path:
        return self.root / "qubes"

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    @property
    def pid_file(self) -> Path:
        """Holds the broker's process id; whoever runs the broker holds an flock on it."""
        return self.run_dir / "broker.pid"

    @property
    def log_file(self) -> Path:
        return self.run_dir / "broker.log"

    @property
    def control_socket(self) -> Path:
        return self.run_dir / "control.sock"

    @property
    def no_ip_file(self) -> Path:
        """Why the qubes of the running lab have no IP and no firewall; it is there while they have none."""
        return self.run_dir / "no-ip"

    @property
    def client_program(self) -> Path:
        """The stand-in for ``qrexec-client-vm``."""
        return self.root / "bin" / "qrexec-client-vm"

    def qube_dir(self, name: str) -> QubeDirectory:
        """Raises `StoreError` for what is no qube's name, so that no name leads out of the directory."""
        try:
            return QubeDirectory(self.qubes_dir / parse_qube_name(name))
        except TextError as error:
            raise StoreError(f"{self.qubes_dir}: {error}") from error

    def qube_names(self) -> list[QubeName]:
        """The names of all qubes, sorted."""
        try:
            return [parse_qube_name(name) for name in _visible(self.qubes_dir)]
        except OSError as error:
            raise StoreError(f"{self.qubes_dir}: {error.strerror}") from error
        except TextError as error:
            raise StoreError(f"{self.qubes_dir}: {error}") from error

    def qubes(self) -> dict[QubeName, Qube]:
        """All qubes by name; raises `StoreError` if one of them cannot be read."""
        return {name: self.qube(name) for name in self.qube_names()}

    def qube(self, name: str) -> Qube:
        """Raises `StoreError` if there is no such qube or its file is not as it should be."""
        path = self.qube_dir(name).file
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise StoreError(f"{path}: no qube {name!a}; there are {', '.join(self.qube_names())}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{path}: {why(error)}") from error
        return Qube.parse(name, text, str(path))

    def write_qube(self, qube: Qube) -> None:
        """Make or change a qube; its QubesDB follows its state: filled at start, empty when halted."""
        place = self.qube_dir(qube.name)
        for directory in (place.features, place.vm_config):
            directory.mkdir(parents=True, exist_ok=True)
        if qube.is_running:
            self._deliver(qube.name, is_running=True)
        # In this order nobody sees a running qube that lacks its configuration.
        write_text(place.file, str(qube))
        if not qube.is_running:
            self._deliver(qube.name, is_running=False)

    def _deliver(self, name: str, *, is_running: bool) -> None:
        """Make a running qube's QubesDB what its features say; a halted one has none."""
        delivered = {}
        if is_running:
            features = _read_values(self.qube_dir(name).features, DELIVERED_PREFIX)
            delivered = {key.removeprefix(DELIVERED_PREFIX): value for key, value in features.items()}
        place = self.qube_dir(name).vm_config
        present = _read_values(place)
        for key in present.keys() - delivered.keys():
            (place / key).unlink(missing_ok=True)
        for key, value in delivered.items():
            if present.get(key) != value:
                write_text(place / key, value)

    def _mend(self) -> None:
        """Finish what was left half done: a writer killed between a feature and its delivery, or a state that
        was changed by hand.
        """
        for name in self.qube_names():
            with suppress(StoreError):  # a qube that cannot be read is reported elsewhere
                self._deliver(name, is_running=self.qube(name).is_running)

    def set_state(self, name: str, state: QubeState) -> None:
        """Start or halt a qube, as `write_qube` does; nothing happens if it is in that state already."""
        qube = self.qube(name)
        if qube.state is not state:
            self.write_qube(replace(qube, state=state))

    def features(self, name: str) -> dict[str, str]:
        """A qube's own features, by name."""
        return _read_values(self.qube_dir(name).features)

    def vm_config(self, name: str) -> dict[str, str]:
        """What the qube itself can read in its QubesDB under ``/vm-config``."""
        return _read_values(self.qube_dir(name).vm_config)

    def feature(self, name: str, key: str, *, with_template: bool = False) -> str | None:
        """One feature's value, or None; as ``features.check_with_template`` does if ``with_template``."""
        value = self.features(name).get(key)
        if value is None and with_template:
            template = self.qube(name).template
            if template is not None:
                return self.features(template).get(key)
        return value

    def set_feature(self, name: str, key: str, value: str) -> None:
        """Set a feature; a running qube sees a ``vm-config.`` one at once. Raises `StoreError`."""
        place = self.qube_dir(name)
        path = place.features / _checked_feature(place, key)
        is_delivered = key.startswith(DELIVERED_PREFIX)
        if is_delivered and (len(key) > len(DELIVERED_PREFIX) + KEY_MAX or len(value) > VALUE_MAX):
            raise StoreError(
                f"{path}: QubesDB takes names of at most {KEY_MAX} characters after {DELIVERED_PREFIX!r}, and"
                f" values of at most {VALUE_MAX} bytes"
            )
        request = len(f"admin.vm.feature.Set+{key} dom0 name {name}\0{value}")
        if request > _REQUEST_MAX:
            raise StoreError(f"{path}: the Admin API takes requests of {_REQUEST_MAX} bytes, not {request}")
        try:
            write_text(path, parse_printable(value))
        except TextError as error:
            raise StoreError(f"{path}: {error}") from error
        if is_delivered and self.qube(name).is_running:
            write_text(place.vm_config / key.removeprefix(DELIVERED_PREFIX), value)

    def remove_feature(self, name: str, key: str) -> None:
        """Remove a feature, and what a qube sees of it; nothing happens if it is not there."""
        place = self.qube_dir(name)
        (place.features / _checked_feature(place, key)).unlink(missing_ok=True)
        if key.startswith(DELIVERED_PREFIX):
            (place.vm_config / key.removeprefix(DELIVERED_PREFIX)).unlink(missing_ok=True)

    def knobs(self) -> Knobs:
        """What ``lab.json`` sets; raises `StoreError` that names the file and the key."""
        try:
            data = json.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise NoLabError(self) from None
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.file}: {why(error)}") from error
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise StoreError(f'{self.file}: must be {{"version": {VERSION}, "knobs": {{...}}}}')
        return Knobs.parse(data.get("knobs", {}), str(self.file))

    def write_knobs(self, knobs: Knobs) -> None:
        data = {"version": VERSION, "knobs": knobs.as_json()}
        write_text(self.file, json.dumps(data, indent=2) + "\n")

    @contextmanager
    def locked(self, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
        """Exclude other writers; raises `StoreError` if one of them does not let go within ``timeout_s``.

        The directory itself is locked: a file that the broker made for that, while somebody deletes the lab,
        would be in their way.
        """
        deadline = time.monotonic() + timeout_s
        try:
            fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"{self.root}: {why(error)}") from error
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise StoreError(f"{self.root}: another program changes this lab") from None
                    time.sleep(_LOCK_RETRY_S)
            self._mend()
            yield
        finally:
            os.close(fd)


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Replace a file as a whole; raises `StoreError`. ``mode`` holds whatever the umask is."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"{path}: {error.strerror}") from error


def _may_be_lab(lab: LabDirectory) -> bool:
    """Nobody else can look into a directory that its user has closed."""
    return not os.access(lab.root, os.X_OK, effective_ids=True) or lab.file.exists()


def _user_name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _checked_feature(place: QubeDirectory, key: str) -> str:
    if not _FEATURE_NAME.match(key):
        raise StoreError(f"{place.features}: {key!a} is no feature's name: [a-zA-Z0-9_.-]+, no dot first")
    if not place.file.exists():
        raise StoreError(f"{place.file}: no such qube")
    return key


def _read_values(directory: Path, prefix: str = "") -> dict[str, str]:
    """The files there whose names begin so. Raises `StoreError`."""
    try:
        return {
            name: _read(os.path.join(directory, name))
            for name in _visible(directory)
            if name.startswith(prefix)
        }
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{directory}: {why(error)}") from error


def _read(path: str) -> str:
    """The text of a small file: a lab has thousands, and `Path.read_text` takes three times as long."""
    with open(path, "rb", buffering=0) as file:
        return file.read().decode()


def _visible(directory: Path) -> list[str]:
    """What lies there, sorted; a leading dot is for files that are being written. Raises OSError."""
    return sorted(name for name in os.listdir(directory) if not name.startswith("."))
