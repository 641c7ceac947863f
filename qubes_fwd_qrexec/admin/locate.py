# SPDX-License-Identifier: GPL-2.0-or-later
"""Which system a command is for: a lab that was named, or the Qubes system that it runs on."""

import os
from collections.abc import Mapping

from qubes_fwd_qrexec.common.errors import RefusedError

from .backend import Backend

LAB_VARIABLE = "QVM_FORWARD_LAB"
_MAKE_A_LAB = f"make a lab with 'qvm-forward-lab init DIR', then name it with --lab DIR or {LAB_VARIABLE}=DIR"
# In dom0, as qubesadmin itself tells (qubesadmin/__init__.py), and in a qube (qubes-core-agent-linux).
_DOM0_SIGN = "/etc/qubes-release"
_QUBE_SIGN = "/usr/share/qubes/marker-vm"
_PACKAGES = {
    "qubesadmin": "python3-qubesadmin",
    "qrexec": "qubes-core-qrexec (on Debian python3-qrexec)",
}


def open_backend(lab: str | None, environ: Mapping[str, str]) -> Backend:
    """The backend for ``--lab`` or the environment, else for this Qubes system; asks nothing of it yet.

    Raises `RefusedError` or `StoreError`.
    """
    if lab == "":
        # As --lab "$LAB" is where LAB is not set: what was meant for a lab must not meet a real system.
        raise RefusedError("--lab is empty: name the directory of the lab")
    path = lab or environ.get(LAB_VARIABLE)
    if path:
        try:
            from qubes_fwd_qrexec.lab.directory import LabDirectory

            from .labstore import LabStore
        except ModuleNotFoundError as error:
            # dom0's package leaves them out.
            raise RefusedError(f"{path}: to open a lab, install the package qubes-fwd-qrexec-lab") from error
        return LabStore(LabDirectory.open(path))
    from importlib.util import find_spec

    is_dom0 = os.path.exists(_DOM0_SIGN)
    if not is_dom0 and not os.path.exists(_QUBE_SIGN):
        raise RefusedError(f"this is no Qubes system, and no lab was named; {_MAKE_A_LAB}")
    missing = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        install = f"install {' and '.join(missing)}"
        if is_dom0:
            raise RefusedError(f"dom0 lacks what qvm-forward asks it with: {install}")
        raise RefusedError(
            "qvm-forward is a command of dom0, and this is a qube; run it there. In a qube that may manage "
            f"this system, {install}; to try it without one, {_MAKE_A_LAB}"
        )
    from .qubesstore import QubesStore

    return QubesStore()
