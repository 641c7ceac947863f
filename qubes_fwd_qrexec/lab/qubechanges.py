# SPDX-License-Identifier: GPL-2.0-or-later
"""What qubesd does to qubes at the word of Qubes' own tools, done to a lab.

It refuses what qubesd refuses, in the same words where it says something to the user. All functions take the
lab's lock; each change is there as a whole or not at all. Facts: qubes-core-admin qubes/app.py, qubes/vm/.
"""

import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace

from qubes_fwd_qrexec.common.errors import RefusedError, StoreError, TextError, UsageError
from qubes_fwd_qrexec.common.services import FORWARD_SERVICE
from qubes_fwd_qrexec.common.values import QubeName, parse_address, parse_qube_name

from . import asking
from .blueprint import DEFAULT_NETVM, DEFAULT_TEMPLATE, offer_services
from .directory import LabDirectory, QubeDirectory, write_text
from .qube import LABELS, Qube, QubeClass, QubeState

# Networks and first halves of addresses: qubes-core-admin qubes/config.py and qubes/vm/mix/net.py.
_PREFIXES = {False: ("10.137.0.", "fd09:24ef:4179::a89:"), True: ("10.138.0.", "fd09:24ef:4179::a8a:")}
_HOST_MAX = 254
_TRUTHS = {
    **dict.fromkeys(("1", "yes", "true", "on"), True),
    **dict.fromkeys(("0", "no", "false", "off"), False),
}
# What is copied of a qube's directory to its clones.
_CLONED = ("features", "etc", "usr-local-etc")
# A qube that starts may bring its netvms and its units with it; one that halts has some seconds for that.
_FOLLOW_TIMEOUT_S = 60.0


class InUseError(RefusedError):
    """Another qube needs this one."""


def find(lab: LabDirectory, name: str) -> Qube:
    """A qube that the user has named. Raises `UsageError` if there is none, `StoreError`."""
    if name not in (names := lab.qube_names()):
        raise UsageError(f"no such domain: {name!r}; there are {', '.join(names)}")
    return lab.qube(name)


def follow(lab: LabDirectory) -> None:
    """Have a lab that is up do what its directory says, and return when it has. Raises `ForwardError`."""
    with suppress(asking.DownError):
        asking.ask(lab, {"do": "reload"}, _FOLLOW_TIMEOUT_S)


def property_names(qube: Qube) -> list[str]:
    """The properties that a qube of this class has, sorted."""
    names = ["icon", "klass", "label", "name"]
    if not qube.is_admin:
        names += ["ip", "ip6", "netvm", "provides_network"]
    if qube.klass in (QubeClass.APP, QubeClass.DISPOSABLE):
        names.append("template")
    if qube.klass is QubeClass.APP:
        names.append("template_for_dispvms")
    return sorted(names)


def set_property(lab: LabDirectory, name: str, key: str, text: str) -> None:
    """As ``qvm-prefs``. Raises `UsageError` for no such property, `RefusedError`, `StoreError`."""
    with lab.locked():
        qube = _with_property(lab, find(lab, name), key, text)
        if key == "template":
            offer_services(lab.qube_dir(name), forward=_has_our_package(lab, qube.template))
        lab.write_qube(qube)
    follow(lab)


def change_tags(lab: LabDirectory, name: str, tags: Collection[str], *, is_added: bool) -> None:
    """As ``qvm-tags add`` and ``del``. Raises `StoreError`, `UsageError`."""
    with lab.locked():
        qube = find(lab, name)
        kept = set(qube.tags).difference(tags)
        lab.write_qube(replace(qube, tags=tuple(sorted(kept.union(tags) if is_added else kept))))


def clone(lab: LabDirectory, old: str, new: str) -> None:
    """As ``qvm-clone``: all properties but the addresses, features, tags and services. Raises `RefusedError`,
    `StoreError`, `TextError`, `UsageError`.
    """
    with lab.locked():
        source = find(lab, old)
        if source.is_admin:
            raise RefusedError("dom0 cannot be cloned")
        _add(lab, replace(source, name=parse_qube_name(new)), like=source.name)
    follow(lab)


def create(lab: LabDirectory, name: str, klass: str, properties: Mapping[str, str]) -> None:
    """As ``qvm-create``. A disposable has the properties, features and services of its template. Raises
    `RefusedError`, `StoreError`, `TextError`, `UsageError`.
    """
    with lab.locked():
        if klass not in set(QubeClass) - {QubeClass.ADMIN}:
            raise UsageError(f"no such class: {klass!r}; there are AppVM, DispVM, StandaloneVM, TemplateVM")
        new = Qube(name=parse_qube_name(name), klass=QubeClass(klass))
        like = None
        if new.klass is QubeClass.APP:
            new = replace(new, template=DEFAULT_TEMPLATE)
        if new.klass is not QubeClass.TEMPLATE:
            new = replace(new, netvm=DEFAULT_NETVM if DEFAULT_NETVM in lab.qube_names() else None)
        if new.klass is QubeClass.DISPOSABLE:
            template = lab.qube(_set_template(lab, new, properties.get("template", "")).template or "")
            like = template.name
            disposable = replace(template, template_for_dispvms=False, template=like)
            new = replace(disposable, name=new.name, klass=new.klass)
        for key, text in properties.items():
            new = _with_property(lab, new, key, text)
        _add(lab, new, like)
    follow(lab)


def start(lab: LabDirectory, name: str) -> None:
    """As ``qvm-start``: a qube, and before it its netvms. Raises `RefusedError` if it runs, `StoreError`."""
    with lab.locked():
        if find(lab, name).is_running:
            raise RefusedError("Domain is already running")
        start_with_netvms(lab, name)
    follow(lab)


def start_with_netvms(lab: LabDirectory, name: str) -> None:
    """What is locked already."""
    names = [QubeName(name)]
    while (netvm := lab.qube(names[-1]).netvm) is not None and netvm not in names:
        names.append(netvm)
    for each in reversed(names):
        lab.set_state(each, QubeState.RUNNING)


def shutdown(lab: LabDirectory, names: Iterable[str], *, force: bool = False) -> dict[str, str]:
    """As ``qvm-shutdown --wait``: when this returns, nothing runs in these qubes. What cannot be halted is
    returned with the reason. Raises `StoreError`, `UsageError`.
    """
    with lab.locked():
        qubes = lab.qubes()
        left = [find(lab, name).name for name in dict.fromkeys(names)]
        # A netvm may be halted once the qubes behind it are, in whatever order they are named.
        for _ in range(len(left)):
            for name in [name for name in left if not _why_not_halted(qubes, name, force)]:
                left.remove(name)
                qubes[name] = replace(qubes[name], state=QubeState.HALTED)
                lab.set_state(name, QubeState.HALTED)
    follow(lab)
    return {name: _why_not_halted(qubes, name, force) for name in left}


def remove(lab: LabDirectory, name: str) -> None:
    """As ``qvm-remove``. Raises `InUseError`, `RefusedError`, `StoreError`, `UsageError`."""
    with lab.locked():
        qube = find(lab, name)
        if qube.is_running:
            raise RefusedError(f"Domain is not powered off: {name!r}")
        if users_of(lab, name):
            raise InUseError(f"Domain is in use: {name!r}")
        place = lab.qube_dir(name).root
        # Renamed first: nobody sees half a qube.
        doomed = place.with_name(f".{name}.removed")
        try:
            shutil.rmtree(doomed, ignore_errors=True)
            place.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            raise StoreError(f"{error.filename}: {error.strerror}") from error
    follow(lab)


def users_of(lab: LabDirectory, name: str) -> list[tuple[str, QubeName]]:
    """Which property of which other qube names this one."""
    return [
        (key, qube.name)
        for qube in lab.qubes().values()
        for key in ("netvm", "template")
        if getattr(qube, key) == name and qube.name != name
    ]


def _why_not_halted(qubes: Mapping[QubeName, Qube], name: QubeName, force: bool) -> str:
    if qubes[name].is_admin:
        return "dom0 cannot be shut down"
    behind = [qube.name for qube in qubes.values() if qube.netvm == name and qube.is_running]
    if behind and not force and qubes[name].is_running:
        return f"There are other VMs connected to this VM: {', '.join(behind)}"
    return ""


def _add(lab: LabDirectory, qube: Qube, like: QubeName | None) -> None:
    """Make a qube that is halted, with its own addresses, and whatever else ``like`` has."""
    if qube.name in lab.qube_names():
        raise RefusedError(f"Qube already exists: {qube.name}")
    ip, ip6 = _free_addresses(lab, is_disposable=qube.klass is QubeClass.DISPOSABLE)
    qube = replace(qube, state=QubeState.HALTED, ip=ip, ip6=ip6)
    # It gets its name when it is whole.
    place = QubeDirectory(lab.qubes_dir / f".{qube.name}.new")
    try:
        shutil.rmtree(place.root, ignore_errors=True)
        place.vm_config.mkdir(parents=True)
        if like is None:
            place.features.mkdir()
        else:
            for each in _CLONED:
                with suppress(FileNotFoundError):
                    shutil.copytree(lab.qube_dir(like).root / each, place.root / each, symlinks=True)
        if qube.klass is not QubeClass.TEMPLATE and like is None:
            offer_services(place, forward=_has_our_package(lab, qube.template))
        write_text(place.file, str(qube))
        place.root.rename(lab.qube_dir(qube.name).root)
    except OSError as error:
        shutil.rmtree(place.root, ignore_errors=True)
        raise StoreError(f"{error.filename}: {error.strerror}") from error


def _free_addresses(lab: LabDirectory, *, is_disposable: bool) -> tuple[str, str]:
    """The first after those that are taken, of both families. Raises `RefusedError`."""
    prefix, prefix6 = _PREFIXES[is_disposable]
    taken = [
        int(qube.ip.removeprefix(prefix))
        for qube in lab.qubes().values()
        if qube.ip is not None and qube.ip.startswith(prefix)
    ]
    number = max(taken, default=0) + 1
    if number > _HOST_MAX:
        raise RefusedError(f"no address is left after {prefix}{_HOST_MAX}")
    return f"{prefix}{number}", f"{prefix6}{number:x}"


def _has_our_package(lab: LabDirectory, template: QubeName | None) -> bool:
    """A qube without template has it: there is nothing else in it."""
    return template is None or lab.feature(template, f"supported-rpc.{FORWARD_SERVICE}") is not None


def _with_property(lab: LabDirectory, qube: Qube, key: str, text: str) -> Qube:
    key = key.replace("-", "_")
    if key not in property_names(qube):
        raise UsageError(f"no such property: {key!r}")
    if key not in _SETTERS:
        raise RefusedError(f"{key!r} of {qube.name!r} cannot be changed")
    try:
        return _SETTERS[key](lab, qube, text)
    except TextError:
        raise RefusedError(f"Invalid value {text!r} for property {key!r} of {qube.name!r}") from None


def _named(lab: LabDirectory, text: str) -> Qube:
    """Raises `RefusedError`."""
    if text not in lab.qube_names():
        raise RefusedError(f"No such domain: {text!r}")
    return lab.qube(text)


def _set_netvm(lab: LabDirectory, qube: Qube, text: str) -> Qube:
    if text.lower() in ("", "none"):
        return replace(qube, netvm=None)
    netvm = _named(lab, text)
    if not netvm.provides_network:
        raise RefusedError(f"The {netvm.name} qube does not provide network")
    behind, qubes = {netvm.name}, lab.qubes()
    way_out: Qube | None = netvm
    while way_out is not None and way_out.netvm is not None and way_out.netvm not in behind:
        behind.add(way_out.netvm)
        way_out = qubes.get(way_out.netvm)
    if qube.name in behind:
        raise RefusedError("Loops in network are unsupported")
    if qube.name in qubes and qube.is_running and not netvm.is_running:
        raise RefusedError(f"Cannot dynamically attach to stopped qube {netvm.name}")
    return replace(qube, netvm=netvm.name)


def _set_template(lab: LabDirectory, qube: Qube, text: str) -> Qube:
    if qube.is_running and qube.name in lab.qube_names():
        raise RefusedError("Cannot change template while qube is running")
    template = _named(lab, text)
    if qube.klass is QubeClass.DISPOSABLE:
        if not template.template_for_dispvms:
            raise RefusedError(f"template of {qube.name} must have template_for_dispvms set, {text} has not")
    elif template.klass is not QubeClass.TEMPLATE:
        raise RefusedError(f"template of {qube.name} must be a TemplateVM, {text} is none")
    return replace(qube, template=template.name)


def _set_provides_network(lab: LabDirectory, qube: Qube, text: str) -> Qube:
    does = truth(text)
    if not does and any(key == "netvm" for key, _ in users_of(lab, qube.name)):
        raise RefusedError("The qube is still used by other qubes, change theirs 'netvm' first")
    return replace(qube, provides_network=does)


def _set_template_for_dispvms(lab: LabDirectory, qube: Qube, text: str) -> Qube:
    is_one = truth(text)
    if not is_one and any(key == "template" for key, _ in users_of(lab, qube.name)):
        raise RefusedError("Cannot change template_for_dispvms to False while it is in use")
    return replace(qube, template_for_dispvms=is_one)


def truth(text: str) -> bool:
    """What Qubes takes for yes or no. Raises `RefusedError`."""
    try:
        return _TRUTHS[text.lower()]
    except KeyError:
        raise RefusedError(f"Invalid literal for boolean property: {text!r}") from None


def _set_ip(lab: LabDirectory, qube: Qube, text: str) -> Qube:
    return replace(qube, ip=_address(text, 4))


def _set_ip6(lab: LabDirectory, qube: Qube, text: str) -> Qube:
    return replace(qube, ip6=_address(text, 6))


def _address(text: str, version: int) -> str:
    """Raises `TextError`."""
    address = parse_address(text)
    if address.version != version:
        raise TextError(text, f"an IPv{version} address")
    return str(address)


def _set_label(lab: LabDirectory, qube: Qube, text: str) -> Qube:
    if text not in LABELS:
        raise RefusedError(f"Label does not exist: {text}")
    return replace(qube, label=text)


_SETTERS: dict[str, Callable[[LabDirectory, Qube, str], Qube]] = {
    "ip": _set_ip,
    "ip6": _set_ip6,
    "label": _set_label,
    "netvm": _set_netvm,
    "provides_network": _set_provides_network,
    "template": _set_template,
    "template_for_dispvms": _set_template_for_dispvms,
}
