# SPDX-License-Identifier: GPL-2.0-or-later
"""Prints on stderr what a command waits for, and with --verbose every request to qubes and to dom0."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Lock, Timer
from typing import TYPE_CHECKING, Any

from qubes_fwd_qrexec.admin.answers import ANSWER_TIMEOUT_S
from qubes_fwd_qrexec.common.values import QubeName

if TYPE_CHECKING:
    from qubes_fwd_qrexec.admin.backend import Backend

# Nobody wonders before that, and most answers are there.
AFTER_S = 0.5
NAMED_MAX = 3


class Announced:
    """A backend that does the same as another one and announces it; see `backend.Backend`."""

    def __init__(self, backend: "Backend", say: Callable[[str], None], *, is_verbose: bool) -> None:
        self._backend = backend
        self._write = say
        self._is_verbose = is_verbose
        # Several threads may ask at once, and one line is said of all.
        self._lock = Lock()
        self._waited_for: list[str] = []
        self._timer: Timer | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        most_s = ANSWER_TIMEOUT_S if timeout_s is None else timeout_s
        with self._waiting(f"{qube} ({service}, at most {most_s:g} s)"):
            self._tell(f"asks {qube}: {service}")
            return self._backend.ask(qube, service, max_bytes, timeout_s, given)

    def set_feature(self, qube: QubeName, key: str, value: str) -> None:
        self._tell(f"sets feature {key} of {qube}")
        self._backend.set_feature(qube, key, value)

    def remove_feature(self, qube: QubeName, key: str) -> None:
        self._tell(f"removes feature {key} of {qube}")
        self._backend.remove_feature(qube, key)

    def replace_policy(self, text: str, token: str) -> None:
        self._tell("writes dom0's policy")
        self._backend.replace_policy(text, token)

    @contextmanager
    def locked(self) -> Iterator[None]:
        with ExitStack() as lock:
            with self._waiting("another qvm-forward, which is changing something"):
                lock.enter_context(self._backend.locked())
            yield

    def _tell(self, text: str) -> None:
        if self._is_verbose:
            self._say(text)

    def _say(self, text: str) -> None:
        # That nobody reads it any more keeps nothing from being done: panic must close everything.
        with suppress(OSError):
            self._write(text)

    @contextmanager
    def _waiting(self, whom: str) -> Iterator[None]:
        with self._lock:
            self._waited_for.append(whom)
            if self._timer is None:
                self._timer = Timer(AFTER_S, self._say_whom)
                self._timer.daemon = True
                self._timer.start()
        try:
            yield
        finally:
            with self._lock:
                self._waited_for.remove(whom)
                if not self._waited_for and self._timer is not None:
                    self._timer.cancel()
                    self._timer = None

    def _say_whom(self) -> None:
        with self._lock:
            whom = self._waited_for[:NAMED_MAX]
            more = len(self._waited_for) - len(whom)
        if whom:
            self._say(f"waits for {', '.join(whom)}{f' and {more} more' if more else ''}")
