"""Steps that clean records: each drops rows with a reason, or rewrites them."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.clean.dedup import Dedup
from headrace.clean.table import Check, DropNulls
from headrace.clean.text import Unicode
from headrace.steps import Step

STEPS: Mapping[str, type[Step]] = {step.name: step for step in (Unicode, DropNulls, Check, Dedup)}
"""The steps a recipe may list under ``clean``, by name."""
