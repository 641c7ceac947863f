# SPDX-License-Identifier: GPL-2.0-or-later
"""All qubes of the system, read through qubesadmin's objects.

With its cache on, an object reads all properties of its qube in one call, and the list of qubes gives their
states: as many calls as are needed, 4 for a qube with a rule, and as fast as calls made by hand. What the
cache has is never renewed, so each inventory begins with an app of its own.

A qube of which something cannot be read has a ``problem``, and all that was read before it.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from qubes_fwd_qrexec.admin.answers import CALLS_AT_ONCE
from qubes_fwd_qrexec.admin.inventory import ADMIN, Inventory, Qube, feature_matters, is_configuration
from qubes_fwd_qrexec.common.values import QubeName, parse_address, parse_qube_name

from .errors import UnansweredError, asking_qubesd

# qubes-core-admin qubes/vm/qubesvm.py, get_power_state(): nothing of these runs any more.
_NOT_RUNNING = ("Halted", "NA", "Crashed", "Dying")
# qubes/vm/mix/net.py, appvm.py and dispvm.py: which classes always have these, be it with no value.
_ALWAYS = {"netvm": ("AppVM", "DispVM", "StandaloneVM", "TemplateVM"), "template": ("AppVM", "DispVM")}


def read_inventory(open_app: Callable[[], Any], here: QubeName | None, with_config: bool) -> Inventory:
    """All qubes. ``open_app`` makes a `qubesadmin.Qubes`; ``here`` is as in `errors`.

    Raises `StoreError` where more is wrong than one qube.
    """
    app = open_app()
    app.cache_enabled = True
    with asking_qubesd("admin.vm.List", "dom0", here):
        vms = list(app.domains.values())

    def read(vm: Any) -> Qube | None:
        return _read(vm, open_app, here, with_config)

    if here is None:
        found = list(map(read, vms))
    else:
        # What a management qube asks of qubesd are such calls too, and most of each is waiting.
        with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
            found = list(pool.map(read, vms))
    return Inventory({qube.name: qube for qube in found if qube is not None}, here)


def _read(vm: Any, open_app: Callable[[], Any], here: QubeName | None, with_config: bool) -> Qube | None:
    """None if the qube has vanished. Of dom0 nothing is asked, which policy would have to allow too."""
    with asking_qubesd("admin.vm.List", "dom0", here):
        name = parse_qube_name(vm.name)
        features: dict[str, str] = {}
        qube = Qube(name, vm.klass, features, is_running=vm.get_power_state() not in _NOT_RUNNING)
    if qube.klass == ADMIN:
        return qube
    try:
        with asking_qubesd("admin.vm.feature.List", name, here):
            keys = list(vm.features)
        qube = qube._replace(configured=frozenset(filter(is_configuration, keys)))
        for key in keys:
            if feature_matters(key, with_config):
                with asking_qubesd(f"admin.vm.feature.Get+{key}", name, here):
                    value = vm.features.get(key)
                # None: it was removed since it was listed.
                if value is not None:
                    features[key] = value
        with asking_qubesd("admin.vm.tag.List", name, here):
            qube = qube._replace(tags=frozenset(vm.tags))
        with asking_qubesd("admin.vm.property.GetAll", name, here):
            return qube._replace(**properties(vm))
    except UnansweredError as error:
        # To a management qube, a call to a qube that is gone looks like one that policy forbids.
        with asking_qubesd("admin.vm.List", "dom0", here):
            if name not in open_app().domains:
                return None
        # In a management qube, policy may forbid all such calls: then most of the system is unreadable.
        if here is not None:
            raise
        return qube._replace(problem=str(error))


def properties(vm: Any) -> Mapping[str, Any]:
    """What `Qube` has of its properties. Raises what qubesadmin does, and `TextError` and `ValueError`."""

    def value(name: str) -> Any:
        """None for no value, and where the class has no such property."""
        from qubesadmin.exc import QubesPropertyAccessError

        try:
            return getattr(vm, name) or None
        except QubesPropertyAccessError:
            # An AttributeError too, and no sign that there is none.
            raise
        except AttributeError:
            if vm.klass in _ALWAYS.get(name, ()):
                raise ValueError(f"it has no {name}, so nothing is known of its traffic") from None
            return None

    def shown(name: str) -> str:
        """Empty where it is not known: nothing depends on it."""
        with suppress(AttributeError):
            return str(getattr(vm, name) or "")
        return ""

    netvm, template, ip, ip6 = map(value, ("netvm", "template", "ip", "ip6"))
    return {
        "netvm": None if netvm is None else parse_qube_name(netvm.name),
        "template": None if template is None else parse_qube_name(template.name),
        "ip": None if ip is None else str(parse_address(ip)),
        "ip6": None if ip6 is None else str(parse_address(ip6)),
        "provides_network": value("provides_network") is True,
        "template_for_dispvms": value("template_for_dispvms") is True,
        "label": shown("label"),
        "icon": shown("icon"),
    }
