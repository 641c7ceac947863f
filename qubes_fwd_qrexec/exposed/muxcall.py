# SPDX-License-Identifier: GPL-2.0-or-later
"""One mux call of the listener side, whatever it carries: a qrexec call and its mux.

`muxpool` makes it, keeps it and lets it go; `streamcall` has what it does for connections, and `flowcall`
what it does for datagrams.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import GoawayCode
from qubes_fwd_qrexec.relay.muxbase import MuxBase
from qubes_fwd_qrexec.relay.thread import RelayThread

from .callplace import Place
from .callqueue import Key
from .qrexec import Call

M = TypeVar("M", bound=MuxBase)


class MuxCall(ABC, Generic[M]):
    """One mux call of the listener side, from before the call is made until it has ended.

    Each attribute is written either in the loop's thread or in trio's, and may be read in both.
    """

    def __init__(self, relays: RelayThread, ports: TargetPorts) -> None:
        self.settled = trio.Event()
        """Set once it is ready, or it is known that it never will be."""
        self.problem: str | None = None
        self.refusal: Refusal | None = None
        """Why it never became ready, as one word."""
        self.status: int | None = None
        """The exit status of its call, if it has one."""
        self.mux: M | None = None
        self.ready_at = -math.inf
        self.used_at = -math.inf
        """When something that it carried has last ended (`time.monotonic`)."""
        self.opened = 0
        """How many streams or flows it was asked for."""
        self.was_let_go = False
        """Whether this end drains it."""
        self.place: Place | None = None
        """The place of its call among all calls of this qube."""
        self.relays = relays
        self.ports = ports
        self._is_ready = False
        self._is_draining = False
        self._finish: Callable[[str | None], None] | None = None

    @abstractmethod
    def make_mux(self, call: Call) -> M:
        """A mux that uses the sockets of ``call``, owned by this; called in the loop's thread.

        Raises OSError when the kernel can watch no more sockets.
        """

    @property
    @abstractmethod
    def carries(self) -> int:
        """How many streams or flows there are in it."""

    @property
    @abstractmethod
    def is_used(self) -> bool:
        """Whether it carries something, or is about to."""

    @property
    @abstractmethod
    def sole_user(self) -> tuple[Key, float] | None:
        """As the holder of a place: the only client that uses it, and for how many seconds it was idle."""

    @abstractmethod
    def cut(self) -> None:
        """End what it carries, because others need the call; called in the loop's thread."""

    @property
    def is_opening(self) -> bool:
        return not self.settled.is_set()

    @property
    def is_revoked(self) -> bool:
        return self.mux is not None and self.mux.is_revoked

    @property
    def is_draining(self) -> bool:
        """Whether it takes nothing new, and ends with the last that it carries."""
        return self._is_draining

    @property
    def is_usable(self) -> bool:
        """Whether it may be asked to carry more; its mux may have no room all the same."""
        return self._is_ready and not self._is_draining and self.mux is not None

    @property
    def lease_s(self) -> float:
        peer = None if self.mux is None else self.mux.peer
        return 0.0 if peer is None else peer.lease_s

    @property
    def quiet_s(self) -> float | None:
        """As the holder of a place: for how many seconds it has carried nothing; None if it does now."""
        if self.is_opening or self._is_draining or self.is_used:
            return None
        return min(trio.current_time() - self.ready_at, time.monotonic() - self.used_at)

    def make_room(self) -> None:
        """As the holder of a place: others need the call, so cut what it carries."""
        self.drain()
        self.relays.order(self.cut, self._fail)

    def forget_call(self) -> None:
        """There was no room for its call, and another will be made."""
        self.mux = self.refusal = self.status = self.place = None
        self._is_draining = False

    async def run(self, call: Call) -> str | None:
        """Drive it until it is over. Returns why it ended, or None if it ended as agreed.

        It uses the sockets of ``call`` until then. Raises OSError when the kernel can watch no more sockets.
        """

        def begin(finish: Callable[[str | None], None]) -> None:
            self._finish = finish
            self.mux = self.make_mux(call)

        def let_go() -> None:
            self._finish = None
            if self.mux is not None:
                self.mux.abandon()

        return await self.relays.wait(begin, let_go)

    def drain(self) -> None:
        """Take nothing new, and end with the last that it carries."""
        self._is_draining = self.was_let_go = True

        def drain() -> None:
            if self.mux is not None:
                self.mux.drain(GoawayCode.SHUTDOWN)

        self.relays.order(drain, self._fail)

    def _fail(self) -> None:
        """End it after a bug, in the loop's thread."""
        if self.mux is not None:
            self.mux.fail()

    # As the owner of the mux, in the loop's thread

    def ready(self) -> None:
        def settle() -> None:
            self.ready_at = trio.current_time()
            self.settled.set()

        self._is_ready = True
        self.relays.tell(settle)

    def draining(self, code: GoawayCode) -> None:
        self.turn_away()

    def turn_away(self) -> None:
        """The target takes nothing new. That must not repeat quickly: dom0 judges each new call."""
        if not self._is_draining:
            self._is_draining = True
            self.relays.tell(self._note_end)

    def _note_end(self) -> None:
        if self.place is not None:
            self.place.lost("the target gave a mux call up")

    def over(self, problem: str | None) -> None:
        self._is_draining = True
        if self._finish is not None:
            self._finish(problem)
