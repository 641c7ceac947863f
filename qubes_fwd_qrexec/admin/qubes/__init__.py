# SPDX-License-Identifier: GPL-2.0-or-later
"""A Qubes system as `admin.backend`: what only runs where Qubes' packages qubesadmin and qrexec are."""
