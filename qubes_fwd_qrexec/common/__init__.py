# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0 and the qubes share: rules, configuration, reports, and the values in them."""
