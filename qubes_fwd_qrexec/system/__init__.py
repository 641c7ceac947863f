# SPDX-License-Identifier: GPL-2.0-or-later
"""What the programs ask of the operating system: descriptors, signals, logs, notifications."""
