# SPDX-License-Identifier: GPL-2.0-or-later
"""Words for where clients of a forward come in, and who they are."""

from qubes_fwd_qrexec.admin.states import Forward
from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.rules import ForwardRule
from qubes_fwd_qrexec.common.values import QubeName


def asked(rule: ForwardRule) -> list[str]:
    """Whom a rule lets in, as it states that."""
    return str(rule.sources).split(",")


def let_in(forward: Forward) -> str:
    """Whom a forward lets in, and behind each name what it stands for now."""
    now: dict[str, list[str]] = {}
    for name, qube, addresses in forward.let_in:
        where = (str(network.network_address) for network in addresses)
        now.setdefault(name, []).append(" ".join(where if name == qube else (qube, *where)))
    names = {str(name) for name in forward.named.rule.sources.qubes}
    return ", ".join(
        f"{name} ({', '.join(now.get(name, ())) or 'nobody'})" if name in names or name[0] == "@" else name
        for name in asked(forward.named.rule)
    )


def is_local(forward: Forward) -> bool:
    """Whether it listens at a loopback address, which nobody but the exposed qube itself reaches."""
    listen = forward.named.rule.listen
    return listen is not None and listen.is_loopback


def where(forward: Forward) -> str:
    """The address and the side of its exposed qube, as a rule has them."""
    listen = forward.named.rule.listen
    at = "" if listen is None else f" at {listen}"
    return at if is_local(forward) else f"{at} ({forward.side} side)"


def entrance(exposed: QubeName | None, side: Side | None) -> str:
    """A qube and its side; that of a qube that is gone is not known."""
    return "no qube" if exposed is None else exposed if side is None else f"{exposed} ({side} side)"
