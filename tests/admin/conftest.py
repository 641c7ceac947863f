# SPDX-License-Identifier: GPL-2.0-or-later
"""Systems to try dom0's side on."""

from systems import *  # noqa: F403
