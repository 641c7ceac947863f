# SPDX-License-Identifier: GPL-2.0-or-later
"""Qubes' own tools for qubes, as subcommands: ``qvm-forward-lab prefs`` is a lab's ``qvm-prefs``, and so on.

They take, print and refuse what the real ones do, as far as a lab has it. Facts: qubes-core-admin-client
qubesadmin/tools/.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence

from qubes_fwd_qrexec.common.errors import ForwardError, RefusedError, UsageError

from . import qubechanges
from .directory import LabDirectory
from .qube import LABELS, Qube

_SERVICE = "service."
_Run = Callable[[LabDirectory, argparse.Namespace], int]


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Make ``parser`` that of the tool ``name``; its default ``tool`` then is what runs it."""
    parser.description = f"Does to a qube of the lab what qvm-{name} does to one of Qubes."
    many = name in ("start", "shutdown", "remove")
    if name != "create":
        parser.add_argument("qubes", metavar="QUBE", nargs="+" if many else 1)
    add, tool = _TOOLS[name]
    add(parser)
    parser.set_defaults(tool=tool)


def _add_prefs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("property", metavar="PROPERTY", nargs="?")
    parser.add_argument("value", metavar="VALUE", nargs="?", help="'' for a netvm means none")


def _prefs(lab: LabDirectory, arguments: argparse.Namespace) -> int:
    (name,) = arguments.qubes
    if arguments.value is not None:
        qubechanges.set_property(lab, name, arguments.property, arguments.value)
        return 0
    qube = qubechanges.find(lab, name)
    names = qubechanges.property_names(qube)
    if arguments.property is None:
        width = max(map(len, names))
        for key in names:
            mark = "D" if getattr(qube, key) in (None, False) else "-"
            print(f"{key:{width}}  {mark}  {getattr(qube, key)}")
        return 0
    key = arguments.property.replace("-", "_")
    if key not in names:
        raise UsageError(f"no such property: {key!r}")
    if getattr(qube, key) is not None:
        print(getattr(qube, key))
    return 0


def _add_features(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", metavar="FEATURE", nargs="?")
    parser.add_argument("value", metavar="VALUE", nargs="?")
    parser.add_argument("-D", "--unset", "--default", "--delete", action="store_true")


def _features(lab: LabDirectory, arguments: argparse.Namespace) -> int:
    return _change_feature(lab, arguments, "", str, str)


def _add_service(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", metavar="SERVICE", nargs="?")
    parser.add_argument("value", metavar="on|off", nargs="?")
    parser.add_argument("-D", "--unset", "--default", "--delete", action="store_true")


def _service(lab: LabDirectory, arguments: argparse.Namespace) -> int:
    return _change_feature(
        lab,
        arguments,
        _SERVICE,
        lambda text: "1" if qubechanges.truth(text) else "",
        lambda value: "on" if value else "off",
    )


def _change_feature(
    lab: LabDirectory,
    arguments: argparse.Namespace,
    prefix: str,
    stored: Callable[[str], str],
    shown: Callable[[str], str],
) -> int:
    """What ``qvm-features`` and ``qvm-service`` have in common. Exit status 1 says that there is none."""
    (name,) = arguments.qubes
    qubechanges.find(lab, name)
    if arguments.key is None:
        if arguments.unset:
            raise UsageError("--unset requires a feature")
        features = lab.features(name).items()
        _print_table(
            [(key.removeprefix(prefix), shown(value)) for key, value in features if key.startswith(prefix)]
        )
        return 0
    key = prefix + arguments.key
    if arguments.value is None and not arguments.unset:
        value = lab.feature(name, key)
        if value is None:
            return 1
        print(shown(value))
        return 0
    with lab.locked():
        if arguments.unset:
            lab.remove_feature(name, key)
        else:
            lab.set_feature(name, key, stored(arguments.value))
    return 0


def _add_tags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("act", choices=("list", "add", "del"), nargs="?", default="list")
    parser.add_argument("tags", metavar="TAG", nargs="*")


def _tags(lab: LabDirectory, arguments: argparse.Namespace) -> int:
    (name,) = arguments.qubes
    asked = set(arguments.tags)
    if arguments.act == "list":
        found = set(qubechanges.find(lab, name).tags)
        print("".join(f"{tag}\n" for tag in sorted(found & asked if asked else found)), end="")
        return int(not asked <= found)
    if not asked:
        raise UsageError(f"tags {name} {arguments.act}: a tag must follow")
    qubechanges.change_tags(lab, name, asked, is_added=arguments.act == "add")
    return 0


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-C", "--class", dest="klass", metavar="CLASS", default="AppVM")
    parser.add_argument("-t", "--template", metavar="QUBE")
    parser.add_argument("--property", "--prop", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("-l", "--label", metavar="COLOR", choices=LABELS)
    parser.add_argument("name", metavar="NAME")


def _create(lab: LabDirectory, arguments: argparse.Namespace) -> int:
    given_alone = {"template": arguments.template, "label": arguments.label}
    properties = {key: value for key, value in given_alone.items() if value is not None}
    for given in arguments.property:
        key, equals, value = given.partition("=")
        if not equals:
            raise UsageError(f"Invalid property token: {given!r}")
        properties[key] = value
    qubechanges.create(lab, arguments.name, arguments.klass, properties)
    return 0


def _add_clone(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("new", metavar="NEW")


def _clone(lab: LabDirectory, arguments: argparse.Namespace) -> int:
    (old,) = arguments.qubes
    qubechanges.clone(lab, old, arguments.new)
    return 0


def _add_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--skip-if-running", action="store_true", help="leave running qubes alone")


def _start(lab: LabDirectory, arguments: argparse.Namespace) -> int:
    status = 0
    for qube in _found(lab, arguments.qubes):
        if qube.is_running and arguments.skip_if_running:
            continue
        try:
            qubechanges.start(lab, qube.name)
        except ForwardError as error:
            print(f"Error: Starting qube failed: {qube.name}: {error}", file=sys.stderr)
            status = 1
    return status


def _add_shutdown(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wait", action="store_true", help="a lab's shutdown always waits")
    parser.add_argument("--force", action="store_true", help="also where running qubes are connected to it")


def _shutdown(lab: LabDirectory, arguments: argparse.Namespace) -> int:
    failed = qubechanges.shutdown(lab, arguments.qubes, force=arguments.force)
    for name, reason in failed.items():
        print(f"Error: Failed to shut down: {name}: {reason}", file=sys.stderr)
    return len(failed)


def _add_remove(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="do not ask first")


def _remove(lab: LabDirectory, arguments: argparse.Namespace) -> int:
    qubes = _found(lab, arguments.qubes)
    if any(qube.is_admin for qube in qubes):
        raise RefusedError("Domain 'dom0' cannot be removed.")
    if not arguments.force:
        print("This will completely remove the selected VM(s)...", file=sys.stderr)
        for qube in qubes:
            print(" ", qube.name)
        print("Are you sure? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().upper() != "Y":
            raise RefusedError("Remove cancelled.")
    for qube in qubes:
        try:
            qubechanges.remove(lab, qube.name)
        except qubechanges.InUseError:
            print(f"VM {qube.name} cannot be removed. It is in use as:", file=sys.stderr)
            for key, user in qubechanges.users_of(lab, qube.name):
                print(f" - {key} for {user}", file=sys.stderr)
            raise
    return 0


def _found(lab: LabDirectory, names: Sequence[str]) -> list[Qube]:
    """All of them, before anything is done. Raises `UsageError`."""
    return [qubechanges.find(lab, name) for name in dict.fromkeys(names)]


def _print_table(rows: Iterable[tuple[str, str]]) -> None:
    rows = list(rows)
    width = max((len(first) for first, _ in rows), default=0)
    for first, second in rows:
        print(f"{first:{width}}  {second}".rstrip())


_TOOLS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], _Run]] = {
    "prefs": (_add_prefs, _prefs),
    "features": (_add_features, _features),
    "service": (_add_service, _service),
    "tags": (_add_tags, _tags),
    "create": (_add_create, _create),
    "clone": (_add_clone, _clone),
    "start": (_add_start, _start),
    "shutdown": (_add_shutdown, _shutdown),
    "remove": (_add_remove, _remove),
}
