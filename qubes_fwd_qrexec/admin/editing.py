# SPDX-License-Identifier: GPL-2.0-or-later
"""A rule with options changed: ``comment=x`` sets one and ``comment=`` restores its default,
``srchosts+=NET`` and ``srchosts-=NET`` change whom it lets in, and ``expire+=3600`` lets it end that many
seconds later.
"""

from collections.abc import Iterable

from qubes_fwd_qrexec.common.clients import Clients
from qubes_fwd_qrexec.common.errors import RuleError, TextError
from qubes_fwd_qrexec.common.options import Option, unknown
from qubes_fwd_qrexec.common.rules import ForwardRule


def edited(rule: ForwardRule, options: Iterable[Option], now: float) -> ForwardRule:
    """A rule with options changed, one after the other; ``now`` in UNIX seconds. Raises `RuleError`."""
    known = ForwardRule.option_names()
    texts = {name: Option(name, text, f"option {name!a}") for name, text in rule.options().items()}
    for option in options:
        name, text, place = option
        if name in ("srchosts+", "srchosts-"):
            name, text = "srchosts", _clients(texts["srchosts"].value, option)
        elif name == "expire+":
            name, text = "expire", _later(rule, option, now)
        elif name not in known:
            raise unknown(option, known)
        texts.pop(name, None)
        if name == "expire":
            texts.pop("ended", None)
        if text:
            texts[name] = Option(name, text, place)
    return ForwardRule.from_options(texts.values())


def _clients(old: str, option: Option) -> str:
    """Whom a rule lets in that let in ``old``, with some more or without some."""
    name, text, place = option
    try:
        asked = Clients.parse(text)
        if name == "srchosts+" and old != "any":
            return str(Clients.union((Clients.parse(old), asked)))
    except TextError as error:
        raise RuleError(place, str(error), "srchosts") from None
    if name == "srchosts+":
        raise RuleError(
            place, "the rule already lets in everybody; to let in fewer, use srchosts=NET", "srchosts"
        )
    some, less = old.split(","), str(asked).split(",")
    for each in less:
        if each not in some:
            raise RuleError(place, f"{each} is not in the list; the rule lets in {old}", "srchosts")
    if len(less) == len(some):
        raise RuleError(
            place, f"nobody would be left of {old}; to close the forward, use 'disable'", "srchosts"
        )
    return ",".join(each for each in some if each not in less)


def _later(rule: ForwardRule, option: Option, now: float) -> str:
    """An extended end: counted from now if it is already over."""
    if rule.expire is None:
        raise RuleError(option.place, "the rule never expires; to set a time, use expire=TIME", "expire")
    end = int(now) if rule.has_ended else max(rule.expire, int(now))
    return str(end + int(option.value))
