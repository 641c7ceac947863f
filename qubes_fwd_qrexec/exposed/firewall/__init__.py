# SPDX-License-Identifier: GPL-2.0-or-later
"""The exposed qube's firewall, opened for its forwards and nothing else."""
