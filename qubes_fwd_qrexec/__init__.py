# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP forwarding for Qubes OS, over qrexec: one rule in dom0 makes a service in one qube reachable."""

__version__ = "0.1.0"
