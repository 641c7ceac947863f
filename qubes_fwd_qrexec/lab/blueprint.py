# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab that ``init`` makes: its qubes, and the services that each offers.

It is a small system as Qubes' installer leaves it, with a VPN qube added, and one qube (``personal``) whose
template lacks our package, so that the stock service is seen at work too.
"""

import os
import sys
from pathlib import Path

from qubes_fwd_qrexec.common.errors import RefusedError, StoreError
from qubes_fwd_qrexec.common.services import (
    CUT_SERVICE,
    FORWARD_SERVICE,
    NFT_SERVICE,
    REVOKE_SERVICE,
    STATUS_SERVICE,
    UDP_SERVICE,
)
from qubes_fwd_qrexec.common.values import QubeName

from . import shortclient
from .directory import LabDirectory, QubeDirectory, write_text
from .knobs import Knobs
from .qube import Qube, QubeClass, QubeState

_OUR_SERVICES = (FORWARD_SERVICE, UDP_SERVICE, NFT_SERVICE, REVOKE_SERVICE, STATUS_SERVICE, CUT_SERVICE)
CONNECT_SERVICE = "qubes.ConnectTCP"
# docs/facts.md, S6.
_CONNECT_CONFIG = "skip-service-descriptor=true\nexit-on-service-eof=true\n"
DEFAULT_TEMPLATE = QubeName("fedora-42")
DEFAULT_NETVM = QubeName("sys-firewall")
_STOCK_TEMPLATE = QubeName("debian-12")
# Of a script's first line the kernel reads 255 bytes and splits them at blanks: docs/facts.md, L18.
_SHEBANG_MAX = 250
# Lies beside the short client, which runs it where it is not enough itself.
_LONG_CLIENT = ".qrexec-client-vm.py"


def _app(name: str, label: str, netvm: str | None, address: int, *, provides_network: bool = False) -> Qube:
    """Addresses are those that qubes-core-admin hands out: 10.137.0.QID, fd09:24ef:4179::a89:QID."""
    return Qube(
        name=QubeName(name),
        netvm=None if netvm is None else QubeName(netvm),
        ip=f"10.137.0.{address}",
        ip6=f"fd09:24ef:4179::a89:{address:x}",
        provides_network=provides_network,
        template=_STOCK_TEMPLATE if name == "personal" else DEFAULT_TEMPLATE,
        label=label,
    )


_QUBES = (
    Qube(name=QubeName("dom0"), klass=QubeClass.ADMIN, label="black"),
    Qube(name=DEFAULT_TEMPLATE, klass=QubeClass.TEMPLATE, state=QubeState.HALTED, label="black"),
    Qube(name=_STOCK_TEMPLATE, klass=QubeClass.TEMPLATE, state=QubeState.HALTED, label="black"),
    _app("sys-net", "red", None, 5, provides_network=True),
    _app("sys-firewall", "green", "sys-net", 6, provides_network=True),
    _app("sys-vpn", "orange", "sys-firewall", 7, provides_network=True),
    _app("work", "blue", "sys-firewall", 10),
    _app("personal", "yellow", "sys-firewall", 11),
    _app("vault", "black", None, 12),
    _app("untrusted", "red", "sys-vpn", 13),
)

_FEATURES = {
    "sys-vpn": {"service.vpn-handler-openvpn": "1"},
    # qubes-core-agent-linux qubes-rpc/post-install.d/10-qubes-core-agent-rpc.sh: a template announces what
    # is an executable file. The stock qubes.ConnectTCP is a link that leads to no file.
    DEFAULT_TEMPLATE: {"qrexec": "1", **{f"supported-rpc.{service}": "1" for service in _OUR_SERVICES}},
    _STOCK_TEMPLATE: {"qrexec": "1"},
}

_HANDOVER = "qubes-forward-handover"

_POLICY = """\
# The policy of this lab lies here, as dom0's lies in /etc/qubes/policy.d.
# qvm-forward writes 30-forward.policy. What no line allows is denied.
"""


def create_lab(path: str | os.PathLike[str]) -> LabDirectory:
    """Make a lab at ``path``, which must be new or empty.

    Raises `RefusedError` if something lies there, and `StoreError` if it cannot be written.
    """
    lab = LabDirectory(Path(path).absolute())
    try:
        lab.root.mkdir(parents=True, exist_ok=True)
        if any(lab.root.iterdir()):
            raise RefusedError(f"{lab.root}: not empty; name a new or an empty directory")
        for directory in (lab.policy_dir, lab.qubes_dir, lab.run_dir, lab.client_program.parent):
            directory.mkdir()
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}") from error
    write_text(lab.policy_dir / "README", _POLICY)
    for qube in _QUBES:
        lab.write_qube(qube)
        for key, value in _FEATURES.get(qube.name, {}).items():
            lab.set_feature(qube.name, key, value)
        if not qube.is_admin and qube.klass is not QubeClass.TEMPLATE:
            offer_services(lab.qube_dir(qube.name), forward=qube.template == DEFAULT_TEMPLATE)
    write_client(lab)
    if not os.access(lab.client_program, os.X_OK):
        raise StoreError(f"{lab.root}: no program can be run from there, as on a file system mounted noexec")
    # Written last: a directory without this file is no lab, so a half-made lab is never taken for one.
    lab.write_knobs(Knobs())
    return lab


def offer_services(place: QubeDirectory, *, forward: bool) -> None:
    """Have a qube offer the stock service, and ours if ``forward``. Raises `StoreError`."""
    try:
        for directory in (*place.service_dirs, *place.rpc_config_dirs):
            directory.mkdir(parents=True, exist_ok=True)
        services = place.service_dirs[-1]
        _link(services / CONNECT_SERVICE, "/dev/tcp/127.0.0.1")
        for service in _OUR_SERVICES:
            if forward:
                _link(services / service, str(find_rpc_entry(service)))
            else:
                (services / service).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}") from error
    write_text(place.rpc_config_dirs[-1] / CONNECT_SERVICE, _CONNECT_CONFIG)


def write_client(lab: LabDirectory) -> None:
    """Write the lab's own ``qrexec-client-vm`` for the interpreter that runs now.

    The Python client starts without site-packages and without the environment's PYTHON variables, which
    saves half of its start-up time; so the path of this package is written into it. Where Perl is
    installed, most calls need no Python: see `shortclient`.
    """
    short = shortclient.script(sys.executable, lab.client_program.with_name(_LONG_CLIENT))
    long_client = lab.client_program.with_name(_LONG_CLIENT) if short else lab.client_program
    package_parent = Path(__file__).parent.parent.parent
    shebang = f"#!{sys.executable} -IS\n"
    if " " in sys.executable or len(os.fsencode(shebang)) > _SHEBANG_MAX:
        # A line that is shell and Python: the shell runs the second, Python takes it for text.
        shebang = f"#!/bin/sh\n'''exec' \"{sys.executable}\" -IS \"$0\" \"$@\"\n' '''\n"
    write_text(
        long_client,
        f"{shebang}"
        "import sys\n\n"
        f"sys.path.insert(0, {str(package_parent)!r})\n"
        "from qubes_fwd_qrexec.lab.client import main\n\n"
        f"main([{str(lab.client_program)!r}, *sys.argv[1:]])\n",
        mode=0o755,
    )
    if short:
        write_text(lab.client_program, short, mode=0o755)


def find_rpc_entry(service: str) -> Path:
    """The path of one of our RPC entries: in a checkout, among pip's data, or where the packages put it.

    What hands calls over is there if it was built (`make bench`), or is the packages'.
    """
    built = Path(sys.executable).parent / _HANDOVER
    if service == FORWARD_SERVICE and built.exists():
        return built
    in_checkout = Path(__file__).parent.parent.parent / "rpc" / service
    if in_checkout.parent.is_dir():
        return in_checkout
    import sysconfig

    by_pip = Path(sysconfig.get_path("data"), "share", "qubes-fwd-qrexec", "rpc", service)
    return by_pip if by_pip.parent.is_dir() else Path("/etc/qubes-rpc", service)


def _link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
