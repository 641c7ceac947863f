# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be done with a rule or a group of the list, as its context menu says it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from qubes_fwd_qrexec.admin.states import Key, State

from .cells import Item
from .commands import Commands
from .look import Look
from .rows import ENDED
from .words import _


class Entry(NamedTuple):
    """``mnemonic`` is its text; what changes something is there while it can be changed."""

    mnemonic: str
    act: Callable[[], object]
    is_change: bool = True


def entries(item: Item, look: Look, ended: tuple[Key, ...], commands: Commands) -> Iterator[Entry]:
    """Of a rule or of a group; ``ended`` are the rules whose time is over."""
    if item == ENDED:
        yield Entry(_("_Remove all…"), lambda: commands.remove(ended))
    elif isinstance(item, str):
        yield Entry(_("_Add…"), lambda: commands.add(item))
    elif (forward := look.plan.find(*item)) is None:
        yield Entry(_("_Remove…"), lambda: commands.remove([item]))
    else:
        rule = forward.named.rule
        if forward.state is State.SUSPENDED:
            yield Entry(_("_Confirm…"), lambda: commands.confirm(item))
        yield Entry(_("_Edit…"), lambda: commands.edit(item))
        if rule.expire is not None:
            yield Entry(_("One _hour more"), lambda: commands.extend(item))
        if rule.enabled:
            yield Entry(_("_Disable"), lambda: commands.disable(item))
        else:
            yield Entry(_("E_nable"), lambda: commands.enable(item))
        if forward.is_live:
            yield Entry(_("End all c_onnections…"), lambda: commands.cut(item, None))
        yield Entry(_("Dia_gnose"), lambda: commands.diagnose(item), is_change=False)
        yield Entry(_("_Remove…"), lambda: commands.remove([item]))
