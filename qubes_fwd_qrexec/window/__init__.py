# SPDX-License-Identifier: GPL-2.0-or-later
"""The window and the indicator in dom0. What shows imports GTK by `gtk` alone; the rest runs without it."""
