# SPDX-License-Identifier: GPL-2.0-or-later
"""Which system a command is for: a lab that was named, or the Qubes system that it runs on."""

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from qubes_fwd_qrexec.common.errors import RefusedError

if TYPE_CHECKING:
    from qubes_fwd_qrexec.admin.backend import Backend

# The one place where dom0 knows of the lab, by name: it is another package, loaded only when a lab is named.
LAB_MODULE = "qubes_fwd_qrexec.lab.store"
LAB_VARIABLE = "QVM_FORWARD_LAB"
_MAKE_A_LAB = f"make a lab with 'qvm-forward-lab init DIR', then name it with --lab DIR or {LAB_VARIABLE}=DIR"
# In dom0, as qubesadmin itself tells (qubesadmin/__init__.py), and in a qube (qubes-core-agent-linux).
_DOM0_SIGN = "etc/qubes-release"
_QUBE_SIGN = "usr/share/qubes/marker-vm"
_PACKAGES = {"qubesadmin": "python3-qubesadmin", "qrexec": "qubes-core-qrexec (on Debian python3-qrexec)"}


def open_backend(lab: str | None, environ: Mapping[str, str], root: str = "/") -> "Backend":
    """The backend for ``--lab`` or the environment, else for this Qubes system; asks nothing of it yet.

    ``root`` is the root of the file system. Raises `RefusedError` or `StoreError`.
    """
    if lab == "":
        # --lab "$LAB" with LAB unset: what was meant for a lab must not reach a real system.
        raise RefusedError("--lab is empty: name the directory of the lab")
    if path := lab or environ.get(LAB_VARIABLE):
        try:
            module = import_module(LAB_MODULE)
        except ModuleNotFoundError as error:
            raise RefusedError(f"{path}: to open a lab, install the package qubes-fwd-qrexec-lab") from error
        backend: Backend = module.open_backend(path)
        return backend
    from importlib.util import find_spec

    is_dom0 = os.path.exists(os.path.join(root, _DOM0_SIGN))
    if not is_dom0 and not os.path.exists(os.path.join(root, _QUBE_SIGN)):
        raise RefusedError(f"this is not a Qubes system, and no lab was named; {_MAKE_A_LAB}")
    missing = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        install = f"install {' and '.join(missing)}"
        if is_dom0:
            raise RefusedError(f"dom0 lacks packages that qvm-forward needs: {install}")
        raise RefusedError(
            "qvm-forward is a command for dom0, and this is a qube; run it in dom0. In a qube that may "
            f"manage this system, {install}; to try it without Qubes, {_MAKE_A_LAB}"
        )
    from qubes_fwd_qrexec.admin.qubes.store import QubesStore

    return QubesStore(root)
