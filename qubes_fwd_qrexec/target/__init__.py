# SPDX-License-Identifier: GPL-2.0-or-later
"""The target's side: a qrexec call in, a connection to a server of this qube out."""
