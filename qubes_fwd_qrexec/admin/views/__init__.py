# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0 shows and prints about its rules: nothing here decides, and nothing that decides imports it."""
