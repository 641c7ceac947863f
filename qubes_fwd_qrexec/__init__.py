# SPDX-License-Identifier: GPL-2.0-or-later
"""Port forwarding for Qubes OS: one rule in dom0 makes a server in one qube reachable."""

__version__ = "0.1.0"
