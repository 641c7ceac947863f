# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0 and the qubes know each other by: rules, configuration, reports, and the values in them."""
