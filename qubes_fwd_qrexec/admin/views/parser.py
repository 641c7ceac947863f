# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of qvm-forward: its subcommands and options, and their help. It runs none of them.

What values are made of is imported when there is a value to parse, or an option to explain.
"""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

from qubes_fwd_qrexec import __version__
from qubes_fwd_qrexec.common.errors import TextError

from .locate import LAB_VARIABLE

if TYPE_CHECKING:
    from qubes_fwd_qrexec.common.values import ListenPorts, TargetPorts

_HELP_WIDTH = 78
FORMATS = ("line", "xml", "json")
TUNNEL_ACTIONS = ("mark", "unmark", "list")


def build(words: Collection[str] | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line; with ``words``, complete only for commands among them."""
    parser = argparse.ArgumentParser(
        prog="qvm-forward",
        description="Make a server in one qube reachable from the LAN or from other qubes.",
        epilog="qvm-forward(1) explains each command.",
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--lab", metavar="DIR", help=f"work on a lab; {LAB_VARIABLE} says the same")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False, formatter_class=_formatter)
    # SUPPRESS keeps what stood before the command from being forgotten.
    common.add_argument("--lab", metavar="DIR", default=argparse.SUPPRESS, help="work on a lab")
    common.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON, for programs"
    )
    for name, (text, add_arguments) in _COMMANDS.items():
        if words is not None and name not in words:
            commands.add_parser(name, help=text, add_help=False, formatter_class=_formatter)
            continue
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            parents=[common],
            formatter_class=_formatter,
            allow_abbrev=False,
        )
        add_arguments(command)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What a command line asks for. A word too many is the command's error, with its own usage.

    Raises `SystemExit`.
    """
    parser = build(argv)
    args, rest = parser.parse_known_args(argv)
    if rest:
        commands_of(parser)[args.command].error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The parsers of the subcommands, by name; none of one that is a subcommand's itself."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def _formatter(prog: str) -> argparse.HelpFormatter:
    """argparse makes one for each option that is added, and would look for the terminal's size each time."""
    return argparse.HelpFormatter(prog, width=_HELP_WIDTH)


def _typed(parse: Callable[[str], object]) -> Callable[[str], object]:
    """One of our parsers in the form that argparse wants; its error becomes a usage error."""

    def typed(text: str) -> object:
        try:
            return parse(text)
        except TextError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


@_typed
def _qube(text: str) -> object:
    from qubes_fwd_qrexec.common.values import parse_qube_name

    return parse_qube_name(text)


def parse_ports(text: str) -> "tuple[ListenPorts, TargetPorts]":
    """``80``, ``80:8080`` or ``80-90:8080-8090``. Raises `TextError`."""
    from qubes_fwd_qrexec.common.values import ListenPorts, TargetPorts

    exposed, colon, target = text.partition(":")
    listen_ports = ListenPorts.parse(exposed)
    if not colon:
        return listen_ports, TargetPorts(listen_ports.first, listen_ports.last)
    return listen_ports, TargetPorts.parse(target)


def _set(parser: argparse.ArgumentParser) -> None:
    _rule(parser)
    default = "an empty value restores the default"
    parser.add_argument("options", nargs="+", metavar="OPTION=VALUE", help=default)
    parser.add_argument("--was", metavar="LINE", help="refuse if the rule's line is no longer this")
    _no_apply(parser)


def _rule(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    # A broken rule may stand under any name, and must be shown and removed too: these are not parsed.
    parser.add_argument("qube", metavar="QUBE", type=_qube)
    parser.add_argument("name", metavar="NAME", nargs=nargs)


def _rules(parser: argparse.ArgumentParser) -> None:
    _rule(parser, "+")
    _no_apply(parser)


def _qubes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("qube", nargs="*", metavar="QUBE", type=_qube)


def _status(parser: argparse.ArgumentParser) -> None:
    _qubes(parser)
    _flag(parser, "--watch", "show it again every 2 s, until Ctrl-C")


def _nothing(parser: argparse.ArgumentParser) -> None:
    """A command without arguments."""


def _dry_run(parser: argparse.ArgumentParser) -> None:
    _flag(parser, "--dry-run", "show what would change, and change nothing")


def _tunnel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=TUNNEL_ACTIONS, metavar="mark|unmark|list")
    parser.add_argument("qube", nargs="?", metavar="QUBE", type=_qube, help="not with list")


def _export(parser: argparse.ArgumentParser) -> None:
    _qubes(parser)
    parser.add_argument("--format", choices=FORMATS, help="line is the default, json with --json")


def _import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", default="-", metavar="FILE", help="standard input if - or missing")
    parser.add_argument("--format", choices=FORMATS, help="recognised by default")
    parser.add_argument("--qube", type=_qube, metavar="QUBE", help="the target, if the file names none")
    _flag(parser, "--replace", "replace rules of the same name")
    _no_apply(parser)


def _add(parser: argparse.ArgumentParser) -> None:
    from qubes_fwd_qrexec.admin.store import parse_new_name
    from qubes_fwd_qrexec.common.options import one_of
    from qubes_fwd_qrexec.common.rules import Limits, Mode, OnExpire, Proto, Proxy, Transport
    from qubes_fwd_qrexec.common.values import parse_address, parse_printable

    def value(
        option: str, parse: Callable[[str], object], metavar: str, text: str, default: str | None = None
    ) -> None:
        parser.add_argument(option, type=_typed(parse), metavar=metavar, help=text, default=default)

    def choice(option: str, kind: type[StrEnum], default: StrEnum, text: str) -> None:
        value(option, one_of(kind), "|".join(kind), text, default)

    parser.add_argument("qube", metavar="QUBE", type=_qube, help="the qube that runs the server")
    value("ports", parse_ports, "PORT[:PORT]", "the exposed port or range, then the server's")
    networks = "the networks that may connect, or any; required"
    parser.add_argument("--from", dest="sources", action="append", metavar="NET[,NET]", help=networks)
    value("--name", parse_new_name, "NAME", "the rule's name (default: such as tcp-80)")
    _flag(parser, "--internal", "let in other qubes, at the target's netvm")
    parser.add_argument("--via", metavar="QUBE", type=_qube, help="listen at this qube")
    value("--listen", parse_address, "ADDR", "listen at this address only")
    choice("--mode", Mode, Mode.AUTO, "how the traffic travels; nft is not in this version")
    choice("--proto", Proto, Proto.TCP, "udp is not in this version")
    choice("--transport", Transport, Transport.AUTO, "many connections in one qrexec call, or one call each")
    choice("--proxy", Proxy, Proxy.OFF, "tell the server the client's address; it must expect that")
    _flag(parser, "--autostart", "let connections start a halted target")
    parser.add_argument("--expire", metavar="TIME", help="+8h, +300, +2d, a date and time, or never")
    choice("--on-expire", OnExpire, OnExpire.CUT, "what happens to open connections then")
    limits = "such as connections:1000,per-source:100,rate:50, any of them"
    value("--limits", Limits.parse, "LIMITS", limits)
    _flag(parser, "--follow-netvm", "stay open when the netvm changes")
    _flag(parser, "--bypass-tunnel", "accept that the target's tunnel is bypassed")
    value("--comment", parse_printable, "TEXT", "a remark for yourself", "")
    _flag(parser, "--disabled", "store the rule and leave it closed")
    _no_apply(parser)


def _flag(parser: argparse.ArgumentParser, option: str, text: str) -> None:
    parser.add_argument(option, action="store_true", help=text)


def _no_apply(parser: argparse.ArgumentParser) -> None:
    _flag(parser, "--no-apply", "store it, and change nothing else until 'apply'")


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "add": ("Make a forward: check it, store it, and open it.", _add),
    "set": ("Change options of a forward.", _set),
    "remove": ("Close forwards and delete their rules.", _rules),
    "enable": ("Open forwards that were disabled.", _rules),
    "disable": ("Close forwards and keep their rules.", _rules),
    "confirm": ("Approve forwards that are suspended.", _rules),
    "list": ("Show all forwards, or those that involve a qube.", _qubes),
    "show": ("Show everything about one forward, and why.", _rule),
    "status": ("Show what is open now, with figures from its listeners.", _status),
    "diagnose": ("Find out why a forward does not work, and what helps.", _rule),
    "plan": ("Explain what becomes of each forward, and why.", _qubes),
    "apply": ("Bring policy and listeners in line with the rules.", _dry_run),
    "watch": ("Keep policy and listeners in line: apply after each change and when a rule ends.", _nothing),
    "policy": ("Print the qrexec policy that the rules ask for.", _nothing),
    "tunnel": ("Say which qubes are tunnels, such as VPNs, that no forward may bypass.", _tunnel),
    "panic": ("Close everything at once, and hold it closed until resume.", _nothing),
    "resume": ("Open again what panic closed.", _dry_run),
    "export": ("Print rules for import elsewhere.", _export),
    "import": ("Store the rules of an export, or of a firewall.xml.", _import),
}
