# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands that any part of the window can give; the application carries them out."""

from collections.abc import Sequence
from typing import Protocol

from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.admin.views.connected import Client
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.values import QubeName

from .remedies import Remedy


class Commands(Protocol):
    """Each asks the user whatever has to be asked first, and returns at once; what becomes of it is shown."""

    def add(self, target: QubeName | None = None) -> None:
        """A new forward, of that qube."""

    def edit(self, key: Key, options: Sequence[Option] = ()) -> None:
        """Change a rule; ``options`` are filled in already."""

    def extend(self, key: Key, seconds: int = 3600) -> None:
        """Put off its end."""

    def enable(self, key: Key) -> None: ...

    def disable(self, key: Key) -> None: ...

    def confirm(self, key: Key) -> None:
        """Show what was and what will be, and record that if the user agrees."""

    def remove(self, keys: Sequence[Key]) -> None: ...

    def cut(self, key: Key, client: Client | None) -> None:
        """End what one client has open, or all of them."""

    def diagnose(self, key: Key) -> None: ...

    def close_everything(self) -> None: ...

    def resume(self) -> None: ...

    def apply(self) -> None: ...

    def remedy(self, remedy: Remedy) -> None:
        """Take a way out."""
