# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's side: rules and inventory in, policy and listener configuration out. Standard library only."""
