# SPDX-License-Identifier: GPL-2.0-or-later
"""The context menu of a rule or a group of the list, as values."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from qubes_fwd_qrexec.admin.states import Key, State

from .commands import Commands
from .look import Look
from .rows import ENDED, Item
from .words import _


class MenuItem(NamedTuple):
    """``mnemonic`` is its text; what changes something is there while it can be changed."""

    mnemonic: str
    act: Callable[[], object]
    is_change: bool = True


def menu_items(item: Item, look: Look, ended: tuple[Key, ...], commands: Commands) -> Iterator[MenuItem]:
    """Of a rule or of a group; ``ended`` are the rules whose time is over."""
    if item == ENDED:
        yield MenuItem(_("_Remove all…"), lambda: commands.remove(ended))
    elif isinstance(item, str):
        yield MenuItem(_("_Add…"), lambda: commands.add(item))
    elif (forward := look.plan.find(*item)) is None:
        yield MenuItem(_("_Remove…"), lambda: commands.remove([item]))
    else:
        rule = forward.named.rule
        if forward.state is State.SUSPENDED:
            yield MenuItem(_("_Confirm…"), lambda: commands.confirm(item))
        yield MenuItem(_("_Edit…"), lambda: commands.edit(item))
        if rule.expire is not None:
            yield MenuItem(_("One _hour more"), lambda: commands.extend(item))
        if rule.enabled:
            yield MenuItem(_("_Disable"), lambda: commands.disable(item))
        else:
            yield MenuItem(_("E_nable"), lambda: commands.enable(item))
        if forward.is_live:
            yield MenuItem(_("Cu_t all connections…"), lambda: commands.cut(item, None))
        yield MenuItem(_("Dia_gnose"), lambda: commands.diagnose(item), is_change=False)
        yield MenuItem(_("_Remove…"), lambda: commands.remove([item]))
