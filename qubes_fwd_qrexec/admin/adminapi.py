# SPDX-License-Identifier: GPL-2.0-or-later
"""Qubes' Admin API as far as dom0's side needs it: calls of qubesd made, and its answers parsed.

Everything goes through `App.qubesd_call`, so this works alike in dom0 and in a management qube. Formats
are those of qubes-core-admin qubes/api/admin.py. What cannot be read is refused, and the qube named.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, NamedTuple, Protocol

from qubes_fwd_qrexec.common.errors import StoreError, TextError
from qubes_fwd_qrexec.common.values import QubeName, parse_address, parse_qube_name

from .answers import NotRunningError
from .backend import BadNameError, check_feature_name
from .inventory import ADMIN, CONFIG_PREFIX, RULE_PREFIX, TUNNEL_FEATURE, Qube, feature_matters, is_told

# qubes-core-admin qubes/vm/mix/net.py: these have a netvm, be it none; an answer without one is no answer.
_NETWORKED = frozenset({"AppVM", "DispVM", "StandaloneVM", "TemplateVM"})
# qubes/vm/appvm.py and dispvm.py: these always have a template.
_TEMPLATED = frozenset({"AppVM", "DispVM"})
# qubes/vm/qubesvm.py, get_power_state(): nothing of these runs any more.
_NOT_RUNNING = frozenset({"Halted", "NA", "Crashed", "Dying"})
# In the place of an answer that did not come; it is no rule, no list and no configuration.
_UNREAD = "unreadable"
_YES_NO = {"True": True, "False": False}


class Process(Protocol):
    """What of `subprocess.Popen` is used of a call's process."""

    stdin: IO[bytes] | None
    stdout: IO[bytes] | None

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


class App(Protocol):
    """What of `qubesadmin.Qubes` is used. ``qubesd_connection_type`` is "socket" in dom0, else "qrexec"."""

    qubesd_connection_type: str
    local_name: str

    def qubesd_call(
        self, dest: str, method: str, arg: str | None = None, payload: bytes | None = None
    ) -> bytes: ...

    def run_service(
        self, dest: str, service: str, user: str | None = None, *, autostart: bool = True, **popen: int
    ) -> Process: ...


class Vanished(Exception):  # noqa: N818  # it ends the reading of one qube and is no error
    """The qube that was asked about is gone."""


class UnansweredError(StoreError):
    """qubesd did not answer: it refused, failed within, or the qube is gone."""


class Listed(NamedTuple):
    """One line of ``admin.vm.List``."""

    name: QubeName
    klass: str
    is_running: bool


class AdminApi:
    """The calls. Each raises `StoreError` that says what was asked of whom, why not, and a way out."""

    def __init__(self, app: App) -> None:
        self._app = app

    @property
    def is_local(self) -> bool:
        """Whether this is dom0, which no policy binds."""
        return self._app.qubesd_connection_type == "socket"

    @property
    def here(self) -> str:
        """The name of the qube that this runs in."""
        return self._app.local_name

    def qubes(self) -> list[Listed]:
        """All qubes that there are, or in a management qube those that it may see."""
        return parse_list(_text(self._call("dom0", "admin.vm.List")))

    def qube(self, listed: Listed, *, with_config: bool = True) -> Qube | None:
        """Everything about one qube; None if it has vanished. What cannot be read is its ``problem``.

        Nothing more is asked about dom0, which is no end of any forward; policy would have to allow that too.
        """
        if listed.klass == ADMIN:
            return Qube(listed.name, listed.klass, {}, is_running=listed.is_running)
        try:
            return self._read(listed, with_config)
        except Vanished:
            return None

    def _read(self, listed: Listed, with_config: bool) -> Qube:
        """Raises `Vanished`, and `StoreError` where more is wrong than one qube."""
        name = listed.name
        problems: list[str] = []
        answer = self._tried(name, "admin.vm.property.GetAll", problems)
        tags = frozenset(_lines(self._tried(name, "admin.vm.tag.List", problems)))
        keys = _lines(self._tried(name, "admin.vm.feature.List", problems))
        features = {}
        for key in sorted(key for key in keys if feature_matters(key, with_config)):
            # What is no rule and tells no listener may be a mark, without which nothing is known.
            is_single = key.startswith((RULE_PREFIX, CONFIG_PREFIX)) and key != TUNNEL_FEATURE
            try:
                check_feature_name(name, key)
                features[key] = self._tried(name, "admin.vm.feature.Get", [] if is_single else problems, key)
            except BadNameError as error:
                problems.append(str(error))
            except KeyError:
                # It was removed since it was listed.
                continue
        try:
            qube = to_qube(listed, {} if problems else parse_properties(name, answer), tags, features)
        except StoreError as error:
            problems.append(str(error))
            qube = Qube(name, listed.klass, features, is_running=listed.is_running, tags=tags)
        problem = problems[0] if problems else None
        return qube._replace(told=frozenset(filter(is_told, keys)), problem=problem)

    def _tried(self, qube: QubeName, method: str, problems: list[str], arg: str | None = None) -> str:
        """The answer of a call, or a text that fits nothing. Raises `Vanished`, `KeyError` and `StoreError`.

        Only in dom0 can it be this one call that fails. Elsewhere policy may forbid all of its kind, and what
        cannot be read may be most of the system.
        """
        try:
            return _text(self._call(qube, method, arg))
        except UnansweredError as error:
            # A call to a qube that is gone is refused like any that policy forbids.
            if qube not in {other.name for other in self.qubes()}:
                raise Vanished from error
            if not self.is_local:
                raise
            problems.append(str(error))
            return _UNREAD

    def set_feature(self, qube: QubeName, key: str, value: str) -> None:
        try:
            self._call(qube, "admin.vm.feature.Set", key, value.encode("ascii"))
        except Vanished:
            raise StoreError(f"{qube}: there is no such qube any more") from None

    def remove_feature(self, qube: QubeName, key: str) -> None:
        """It need not exist."""
        try:
            self._call(qube, "admin.vm.feature.Remove", key)
        except KeyError:
            pass
        except Vanished:
            raise StoreError(f"{qube}: there is no such qube any more") from None

    def start_service(self, qube: QubeName, service: str, *, has_input: bool = False) -> Process:
        """Start a qrexec call, whose output is a pipe. Raises `NotRunningError` for a halted qube."""
        from subprocess import DEVNULL, PIPE

        try:
            with self._told(qube, service, None):
                return self._app.run_service(
                    qube,
                    service,
                    # A management qube cannot choose; there the policy's user= does.
                    user="user" if self.is_local else None,
                    autostart=False,
                    stdin=PIPE if has_input else DEVNULL,
                    stdout=PIPE,
                    stderr=DEVNULL,
                    # Ctrl-C in a terminal is for us, who end when the call has.
                    start_new_session=True,
                )
        except Vanished:
            raise NotRunningError(f"{service} in {qube}: there is no such qube any more") from None

    def _call(self, dest: str, method: str, arg: str | None = None, payload: bytes | None = None) -> bytes:
        """Raises `Vanished`, `KeyError` for a feature that is not there, and `StoreError`."""
        with self._told(dest, method, arg):
            return self._app.qubesd_call(dest, method, arg, payload)

    @contextmanager
    def _told(self, dest: str, method: str, arg: str | None) -> Iterator[None]:
        """Turn what qubesadmin raises into our errors."""
        from qubesadmin import exc

        what = f"{method}{'' if arg is None else f'+{arg}'} at {dest}"
        try:
            yield
        except exc.QubesVMNotFoundError as error:
            raise Vanished from error
        except exc.QubesFeatureNotFoundError as error:
            raise KeyError(arg) from error
        except exc.QubesVMNotRunningError as error:
            raise NotRunningError(f"{what}: {_plain(error)}") from error
        except exc.QubesDaemonAccessError as error:
            raise UnansweredError(f"{what}: {_plain(error)}. {self._way_out(dest, method)}") from error
        except exc.QubesDaemonCommunicationError as error:
            raise StoreError(
                f"{what}: {_plain(error)}. qvm-forward works as root or as a member of the group qubes, and "
                "qubesd has to run: 'systemctl status qubesd'"
            ) from error
        # The last two are no QubesException: qubesadmin/exc.py.
        except (exc.QubesException, exc.ProtocolError, exc.PermissionDenied) as error:
            raise UnansweredError(f"{what}: {_plain(error)}") from error
        except OSError as error:
            raise StoreError(f"{what}: {_plain(error)}") from error

    def _way_out(self, dest: str, method: str) -> str:
        if self.is_local:
            return "'journalctl -u qubesd' says why"
        target = "@adminvm" if dest == "dom0" else "@anyvm"
        return (
            "If dom0's policy is what refuses it, this line allows it, in a file of /etc/qubes/policy.d that "
            "sorts before 90-admin-default.policy: "
            f"'{method}  *  {self.here}  {target}  allow  target=dom0'. "
            "qvm-forward(1) has all that a management qube needs"
        )


def parse_list(untrusted_text: str) -> list[Listed]:
    """The answer of ``admin.vm.List``: ``NAME class=CLASS state=STATE``, and since 4.3 ``uuid=UUID``."""
    found = []
    for untrusted_line in _lines(untrusted_text):
        untrusted_name, *untrusted_words = untrusted_line.split(" ")
        given = dict(word.partition("=")[::2] for word in untrusted_words)
        try:
            name = parse_qube_name(untrusted_name)
            klass, state = given["class"], given["state"]
        except (TextError, KeyError) as error:
            raise StoreError(f"admin.vm.List: {untrusted_line!a} cannot be read: {error}") from None
        found.append(Listed(name, klass, state not in _NOT_RUNNING))
    return found


def parse_properties(qube: QubeName, untrusted_text: str) -> dict[str, tuple[str, str]]:
    """The answer of ``admin.vm.property.GetAll`` as type and value by name.

    A line is ``NAME default=True|False type=TYPE VALUE``, and a value that is none is empty. The line feeds
    and backslashes that are escaped in values are left so: no property that is read here may have one.
    """
    found = {}
    for untrusted_line in _lines(untrusted_text):
        words = untrusted_line.split(" ", 3)
        if len(words) != 4 or not words[1].startswith("default=") or not words[2].startswith("type="):
            raise StoreError(f"{qube}: the property {untrusted_line!a} cannot be read")
        found[words[0]] = (words[2].removeprefix("type="), words[3])
    return found


def to_qube(
    listed: Listed,
    properties: Mapping[str, tuple[str, str]],
    tags: frozenset[str],
    features: Mapping[str, str],
) -> Qube:
    """What was answered about one qube, checked. Raises `StoreError` that names it and the property."""

    def read(name: str, kind: str, needed: frozenset[str] = frozenset()) -> str | None:
        if name not in properties:
            if listed.klass in needed:
                raise StoreError(
                    f"{listed.name}: qubesd says nothing about its {name}, without which nothing about its "
                    "traffic is known"
                )
            return None
        found_kind, value = properties[name]
        if found_kind != kind:
            raise StoreError(f"{listed.name}: {name} should be of type {kind} and is {found_kind!a}")
        return value or None

    def qube_name(name: str, needed: frozenset[str]) -> QubeName | None:
        value = read(name, "vm", needed)
        return None if value is None else parse_qube_name(value)

    def address(name: str) -> str | None:
        value = read(name, "str")
        return None if value is None else str(parse_address(value))

    def flag(name: str) -> bool:
        value = read(name, "bool") or "False"
        if value not in _YES_NO:
            raise TextError(value, "True or False")
        return _YES_NO[value]

    try:
        return Qube(
            name=listed.name,
            klass=listed.klass,
            features=features,
            netvm=qube_name("netvm", _NETWORKED),
            is_running=listed.is_running,
            ip=address("ip"),
            ip6=address("ip6"),
            provides_network=flag("provides_network"),
            template=qube_name("template", _TEMPLATED),
            template_for_dispvms=flag("template_for_dispvms"),
            tags=tags,
        )
    except TextError as error:
        raise StoreError(f"{listed.name}: a property cannot be read: {error}") from error


def _text(untrusted_answer: bytes) -> str:
    """An answer as text; what is not UTF-8 stays visible and fits nothing that is parsed."""
    return untrusted_answer.decode("utf-8", "backslashreplace")


def _lines(untrusted_text: str) -> list[str]:
    """Not splitlines(), which parts at form feeds and U+2028 too."""
    return [line for line in untrusted_text.split("\n") if line]


def _plain(error: BaseException) -> str:
    """An error's own text on one line, escaped where a terminal could take it for more."""
    words = " ".join(str(error).split()).rstrip(".")
    return "".join(c if " " <= c <= "~" else f"\\u{ord(c):04x}" for c in words) or type(error).__name__
