# SPDX-License-Identifier: GPL-2.0-or-later
"""A stand-in for a Qubes system on one machine: a directory in the place of dom0's inventory, a broker in
the place of the qrexec daemons and agents, a client in the place of ``qrexec-client-vm``.

It shows and tests; it protects nothing: its qubes are network namespaces at best, never a boundary.
"""
