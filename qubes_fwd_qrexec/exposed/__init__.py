# SPDX-License-Identifier: GPL-2.0-or-later
"""The exposed qube's side: an accepted connection in, a qrexec call to its target out."""
