"""The recipe for editors: a JSON Schema made from the steps themselves, and a commented recipe to begin with."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from headrace.model import to_dict
from headrace.recipe.parts import SECTIONS, Files, PublishOptions
from headrace.recipe.reader import is_required, options_of
from headrace.steps import Step


def _schema(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a type of options."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(arg) for arg in args]}
    if origin is tuple:
        return {"anyOf": [{"type": "array", "items": _schema(args[0])}, _schema(args[0])]}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(args[1])}
    if dataclasses.is_dataclass(kind):
        return _object_schema(kind)
    words = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return {"type": words[kind]} if kind in words else {}


def _object_schema(cls: Any) -> dict[str, Any]:
    options = options_of(cls)
    properties = {}
    for key, (one, kind) in options.items():
        properties[key] = _schema(kind)
        if not isinstance(one.default, type(dataclasses.MISSING)):
            properties[key]["default"] = to_dict(one.default)
    required = [key for key, (one, _) in options.items() if is_required(one)]
    words = " ".join((cls.__doc__ or "").split())
    return {
        "type": "object",
        "description": words.replace("``", "'"),
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _steps_schema(steps: Mapping[str, type[Step]]) -> dict[str, Any]:
    bodies = {}
    for name, cls in steps.items():
        whole = _object_schema(cls)
        kind = options_of(cls)[cls.whole][1] if cls.whole else None
        if kind is not None:
            bare = {**_schema(kind), "description": whole["description"]}
            whole = bare if typing.get_origin(kind) is not tuple else {"anyOf": [*bare["anyOf"], whole]}
        bodies[name] = whole
    entry = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "properties": bodies,
        "additionalProperties": False,
    }
    return {"type": "array", "items": {"anyOf": [entry, {"enum": list(steps)}]}}


def schema_json() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe, for editors, made from the steps themselves."""
    files = {"anyOf": [{"type": "string"}, _object_schema(Files)]}
    sources = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "properties": {"files": files, "dataset": {"type": "string"}},
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Headrace recipe",
        "type": "object",
        "properties": {
            "dataset": {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,127}$"},
            "collect": {"type": "array", "minItems": 1, "items": sources},
            **{section: _steps_schema(steps) for section, steps in SECTIONS.items()},
            "publish": _object_schema(PublishOptions),
            "schedule": {
                "type": "string",
                "description": "A cron line of five fields. Checked and kept; nothing runs by it yet.",
            },
        },
        "required": ["dataset", "collect"],
        "additionalProperties": False,
    }


STARTER = """\
# What this recipe publishes: each run that succeeds makes a new version of this dataset.
dataset: prose

# Where records come from: files (json, ndjson, csv, parquet, arrow, text), or another dataset.
collect:
  - files: ./raw/*.jsonl
  # - dataset: inbox_notes@latest

# Every row that a step drops is kept in the quarantine, with its rule and the value that decided.
clean:
  - unicode: {}                      # one Unicode form, repaired mojibake, no control characters
  - drop_nulls: [text]
  # - check: {age: {not_null: true, min: 0, max: 150}, email: {unique: true}, amount: {outliers: mad}}
  - dedup: {exact: true}             # equal rows are merged into the one with the smallest _id

# What the model takes: tokens packed into rows of one length, or columns as one vector and a label.
transform:
  - tokenize: {tokenizer: bytes, pack: 1024}
  # - features: {columns: [age, height], label: outcome, standardize: true}

# The result becomes a version only if it meets what is expected of it.
publish:
  tag: first
  split: {train: 0.95, val: 0.05}
  expect: {min_rows: 1, max_dropped: 0.9}
"""


def starter() -> str:
    """A commented recipe to begin with."""
    return STARTER
