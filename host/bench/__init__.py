# SPDX-License-Identifier: Apache-2.0
"""Measuring: what ``ringbar bench`` reports about itself, its machine and its peers."""

from __future__ import annotations
