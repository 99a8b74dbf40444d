"""Headrace: a data exchange for model training. ``connect`` is the way in."""

from __future__ import annotations

__version__ = "0.1.0"
