# SPDX-License-Identifier: GPL-2.0-or-later
"""A qube's firewall, opened for forwards and for nothing else, by the one program that may change it.

It knows neither what carries bytes nor dom0's side: who reads it needs only `common` and `system` besides.
"""
