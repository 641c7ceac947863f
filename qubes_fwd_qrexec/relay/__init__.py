# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes between sockets, for both qubes: it knows neither the exposed qube nor the target."""
