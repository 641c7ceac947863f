# SPDX-License-Identifier: GPL-2.0-or-later
"""What a command line says of a rule, for `add` and for `set`: the options of both, and words such as
``comment=x``. Each is parsed once, and its error names it as it was typed.
"""

from argparse import Namespace
from collections.abc import Iterable, Iterator
from itertools import combinations

from qubes_fwd_qrexec.common.errors import RuleError, TextError, UsageError
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.rules import ForwardRule

from .times import parse_expire, parse_span

_NO_FROM = (
    "--from is missing: say who may connect, such as --from 192.168.0.0/16 (separate several by commas, "
    "or repeat --from), or --from any to let in everybody who can reach the port"
)
# By the names of a rule's options, what the command line has for them. `editing` knows expire+.
_TYPED = {name: f"--{name}" for name in ForwardRule.option_names()} | {
    "srchosts": "--from",
    "forwardtype": "--internal",
    "enabled": "--disabled",
    "expire+": "--extend",
}


def new_rule(args: Namespace, now: float) -> ForwardRule:
    """What `add` asks for. Raises `UsageError`."""
    if not args.srchosts:
        raise UsageError(_NO_FROM, "srchosts")
    srcports, colon, dstports = args.ports.partition(":")
    options = [Option("action", "forward", ""), Option("srcports", srcports, "PORT")]
    options += [Option("dstports", dstports, "PORT")] if colon else []
    # ``--expire never`` is the default, and empty.
    options += [option for option in _once(_typed(args), now) if option.value]
    try:
        return ForwardRule.from_options(options)
    except RuleError as error:
        raise UsageError(str(error), *error.options) from None


def changes(args: Namespace, now: float) -> tuple[str | None, list[Option]]:
    """What `set` asks for: the rule's name if it says one, and options for `edited`. Raises `UsageError`."""
    words = [*filter(None, (args.name, *args.options))]
    name = None if not words or "=" in words[0] else words.pop(0)
    return name, _once((*map(_worded, words), *_typed(args)), now)


def _typed(args: Namespace) -> Iterator[Option]:
    """What options such as ``--via`` ask for."""
    for name, place in _TYPED.items():
        texts = vars(args).get(name.replace("-", "_")) or ()
        for text in [",".join(texts)] if name == "srchosts" and texts else texts:
            if not text and name != "comment":
                raise UsageError(f"{place}: it is empty", name)
            yield Option(name, text, place)


def _worded(word: str) -> Option:
    """What a word such as ``via=sys-net`` asks for."""
    name, equals, text = word.partition("=")
    if not equals:
        raise UsageError(f"{word!a}: an option is written name=value")
    if name == "expire" and text.startswith("+="):
        name, text = "expire+", text[2:]
    return Option(name, text, f"option {name!a}")


def _once(options: Iterable[Option], now: float) -> list[Option]:
    """Each option with its time as a rule stores it. Raises `UsageError` if two are about the same."""
    found = list(options)
    for one, other in combinations(found, 2):
        if _about(one) == _about(other) and {one.name[-1], other.name[-1]} != {"+", "-"}:
            again = "given twice" if one.place == other.place else f"{one.place} says that already"
            raise UsageError(f"{other.place}: {again}", _about(other))
    return [option._replace(value=_stored(option, now)) for option in found]


def _about(option: Option) -> str:
    return option.name.rstrip("+-")


def _stored(option: Option, now: float) -> str:
    """What a rule stores for a value: of a time UNIX seconds, or nothing for ``never``."""
    name, text, place = option
    if name == "expire+":
        if (span := parse_span(text)) is None:
            raise UsageError(f"{place}: {text!a} is not a duration such as 1h30m", "expire")
        return str(span)
    if name != "expire" or not text:
        return text
    try:
        expire = parse_expire(text, now)
    except TextError as error:
        raise UsageError(f"{place}: {error}", "expire") from None
    return "" if expire is None else str(expire)
