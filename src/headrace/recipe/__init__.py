"""Recipes: one YAML file says what to collect, how to clean and transform it, and what to publish."""

from __future__ import annotations

from headrace.recipe.parse import parse, problems
from headrace.recipe.parts import Collect, Publish, Recipe
from headrace.recipe.schema import schema_json, starter
from headrace.recipe.secrets import resolve

__all__ = ["Collect", "Publish", "Recipe", "parse", "problems", "resolve", "schema_json", "starter"]
