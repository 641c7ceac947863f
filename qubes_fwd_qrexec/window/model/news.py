# SPDX-License-Identifier: GPL-2.0-or-later
"""A thread that waits for changes of the system, and tells the main thread that there was one."""

import os
import select
from collections.abc import Callable
from threading import Thread

from qubes_fwd_qrexec.admin.watch import RETRY_S, settle
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.system.clock import Clock

from .worker import Deliver, OpenBackend, fault

RETRY_MAX_S = 300.0


class News:
    """Calls ``changed`` in the main thread when it listens and after each change, a burst of them being one;
    ``failed`` when it hears nothing any more, and each time that it still does not. It begins anew after 5 s,
    and then twice as late each time, up to 5 min: in a management qube dom0 tells its user of each refusal.
    """

    def __init__(
        self,
        open_backend: OpenBackend,
        deliver: Deliver,
        changed: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._open_backend = open_backend
        self._deliver = deliver
        self._changed = changed
        self._failed = failed
        self._retry_s = RETRY_S
        self._closed_fd, self._closing_fd = os.pipe2(os.O_CLOEXEC)
        self._thread = Thread(target=self._listen, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Return when the thread has ended, which nothing holds up."""
        os.close(self._closing_fd)
        self._thread.join()
        os.close(self._closed_fd)

    def _listen(self) -> None:
        while not self._is_closed(0):
            try:
                self._follow()
            except (ForwardError, OSError) as error:
                self._tell(error)
            except Exception as error:  # noqa: BLE001  # else the window would grow old in silence
                self._tell(fault(error))
            self._is_closed(self._retry_s)
            self._retry_s = min(2 * self._retry_s, RETRY_MAX_S)

    def _follow(self) -> None:
        """Until it is closed, which takes no time, or something fails."""
        clock = Clock()
        with self._open_backend().changes((self._closed_fd,)) as changes:
            while not self._is_closed(0):
                if changes.wait(None):
                    self._retry_s = RETRY_S
                    settle(changes, clock)
                    self._deliver(self._changed)

    def _tell(self, error: Exception) -> None:
        self._deliver(lambda: self._failed(error))

    def _is_closed(self, within_s: float) -> bool:
        return bool(select.select([self._closed_fd], [], [], within_s)[0])
