# SPDX-License-Identifier: GPL-2.0-or-later
"""What our programs need of the system: descriptors, signals, logs, notifications, a qube's configuration."""
