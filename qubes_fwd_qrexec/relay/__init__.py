# SPDX-License-Identifier: GPL-2.0-or-later
"""Moving bytes between sockets, the same in both qubes: it knows neither the exposed side nor the target."""
