# SPDX-License-Identifier: GPL-2.0-or-later
"""Measures the ways of carrying a TCP connection to a qube, side by side, over one lab broker.

``python -m bench`` starts everything on loopback, prints one table and ends. Direct TCP is the judge of
what the machine can do, the loop of Qubes' own qvm-connect-tcp is what we are compared with.
"""
