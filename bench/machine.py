# SPDX-License-Identifier: GPL-2.0-or-later
"""What the numbers were measured on, to compare them with others."""

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import trio


def describe() -> dict[str, str]:
    """Names and versions, each as one short text."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "processor": f"{len(os.sched_getaffinity(0))} cores, {_processor()}",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "trio": trio.__version__,
        "socat": _socat(),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _socat() -> str:
    program = shutil.which("socat")
    if program is None:
        return "none"
    found = subprocess.run([program, "-V"], capture_output=True, text=True, timeout=5, check=False)
    words = [line.split()[2] for line in found.stdout.splitlines() if line.startswith("socat version ")]
    return words[0] if words else "of unknown version"
