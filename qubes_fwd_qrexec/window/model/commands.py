# SPDX-License-Identifier: GPL-2.0-or-later
"""What any part of the window can ask of the application."""

from collections.abc import Sequence
from typing import Protocol

from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.admin.views.connected import Client
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.values import QubeName

from .actions import Done
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

    def mark(self, qube: str) -> None:
        """Mark a qube as a tunnel."""

    def show(self, key: Key) -> None:
        """Choose a rule in the list, whatever is filtered there."""

    def tell(self, outcome: Done | Exception) -> None:
        """Show what came of a change, below the bars of the main window."""

    def remedy(self, remedy: Remedy) -> None:
        """Take a way out."""
