"""Steps that turn clean records into what a model takes."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.steps import Step
from headrace.transform.features import Features
from headrace.transform.table import Cast, Rename, Select
from headrace.transform.tokens import Tokenize

STEPS: Mapping[str, type[Step]] = {step.name: step for step in (Select, Rename, Cast, Features, Tokenize)}
"""The steps a recipe may list under ``transform``, by name."""
