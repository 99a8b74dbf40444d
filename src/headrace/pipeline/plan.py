"""What a run will read: its inputs pinned to versions and files, cut into tasks, with one schema for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from headrace import reading
from headrace.catalog import Catalog
from headrace.collect import files
from headrace.collect.files import RefusedRecord
from headrace.errors import BadRecipe
from headrace.model import SYSTEM_COLUMNS, Ref, Version, from_dict, to_dict
from headrace.recipe import Collect, Recipe
from headrace.root import Root
from headrace.rows import SYSTEM
from headrace.settings import integer
from headrace.store.types import decode_schema, encode_schema, logical


@dataclass(frozen=True)
class Plan:
    """Pinned inputs. ``tasks`` are JSON; ``groups`` are the numbers of those that one durable step takes."""

    tasks: tuple[dict[str, Any], ...]
    groups: tuple[tuple[int, ...], ...]
    schema: pa.Schema
    inputs: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "tasks": list(self.tasks),
            "groups": [list(group) for group in self.groups],
            "schema": encode_schema(self.schema),
            "inputs": list(self.inputs),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan that ``to_json`` wrote."""
        groups = tuple(tuple(group) for group in data["groups"])
        return cls(tuple(data["tasks"]), groups, decode_schema(data["schema"]), tuple(data["inputs"]))


def make_plan(catalog: Catalog, recipe: Recipe, base: Path, allowed: Sequence[Path] | None) -> Plan:
    """Pin and cut every input of a recipe. Raises NotFound or BadData for what is not there."""
    tasks: list[dict[str, Any]] = []
    inputs: list[dict[str, Any]] = []
    schemas: list[pa.Schema] = []
    for entry in recipe.collect:
        found, schema, about = _dataset(catalog, entry) if entry.kind == "dataset" else _files(entry, base, allowed)
        tasks.extend({**task, "collect": len(inputs)} for task in found)
        inputs.append(about)
        schemas.append(schema)
    schema = unify(schemas, "the inputs")
    return Plan(tuple(tasks), _groups(tasks), pa.schema([*schema, *SYSTEM]), tuple(inputs))


def _groups(tasks: Sequence[dict[str, Any]]) -> tuple[tuple[int, ...], ...]:
    """Tasks of one durable step: at least one per thread, up to four times ``task_bytes`` of input."""
    groups: list[tuple[int, ...]] = []
    held: list[int] = []
    size = 0
    for number, task in enumerate(tasks):
        held.append(number)
        size += task["bytes"]
        if len(held) >= integer("threads") and size >= 4 * integer("task_bytes"):
            groups.append(tuple(held))
            held, size = [], 0
    return (*groups, tuple(held)) if held else tuple(groups)


def _dataset(catalog: Catalog, entry: Collect) -> tuple[list[dict[str, Any]], pa.Schema, dict[str, Any]]:
    assert entry.ref is not None
    ref = entry.ref
    version = catalog.resolve(ref)
    schema = reading.schema_of(catalog, version)
    assert schema is not None
    pinned = str(Ref(ref.dataset, str(version.version), ref.split))
    tasks = list(_row_ranges(catalog, version, pinned, ref.split))
    about = {"ref": pinned, "fingerprint": version.fingerprint, "rows": version.rows}
    return tasks, pa.schema([f for f in schema if f.name not in SYSTEM_COLUMNS]), about


def _row_ranges(catalog: Catalog, version: Version, ref: str, split: str | None) -> Iterator[dict[str, Any]]:
    rows = sum(f.rows for f in catalog.files(version.dataset, version.version, split))
    width = max(1.0, version.bytes / max(1, version.rows))
    step = max(1, int(integer("task_bytes") / width))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        yield {"ref": ref, "skip": start, "rows": count, "bytes": int(count * width)}


def _files(
    entry: Collect, base: Path, allowed: Sequence[Path] | None
) -> tuple[list[dict[str, Any]], pa.Schema, dict[str, Any]]:
    planned = files.plan(entry.location, base, entry.format, integer("task_bytes"), allowed=allowed)
    schema = logical(files.infer_schema(planned))
    parts = [part for task in planned for part in task.parts]
    listed = sorted({(part.name, Path(part.path).stat().st_size) for part in parts})
    digest = hashlib.sha256("\n".join(f"{name}\t{size}" for name, size in listed).encode()).hexdigest()
    about = {
        "files": entry.path,
        "count": len(listed),
        "bytes": sum(size for _, size in listed),
        "fingerprint": digest,
    }
    source = entry.source or entry.path
    tasks = [
        {"files": to_dict(task), "source": source, "bytes": sum(part.bytes for part in task.parts)} for task in planned
    ]
    return tasks, schema, about


def unify(schemas: Sequence[pa.Schema], where: str) -> pa.Schema:
    """One schema that holds all: columns in order of first appearance, integers widen to floats. Else BadRecipe."""
    fields: dict[str, pa.Field] = {}
    for schema in schemas:
        for field in schema:
            known = fields.get(field.name)
            fields[field.name] = field if known is None else known.with_type(_wider(known, field, where))
    return pa.schema([pa.field(field.name, field.type) for field in fields.values()])


def _wider(one: pa.Field, other: pa.Field, where: str) -> pa.DataType:
    if one.type == other.type:
        return one.type
    try:
        both = pa.unify_schemas([pa.schema([one]), pa.schema([other])], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        both = None
    if both is None or pa.types.is_string(both.field(0).type) != pa.types.is_string(one.type):
        raise BadRecipe(
            f"column {one.name!r} is {one.type} in one part of {where} and {other.type} in another",
            hint="cast it to one type in a recipe of its own, or rename one of the two",
        )
    return both.field(0).type


def read_task(
    root: Root, catalog: Catalog, task: dict[str, Any], schema: pa.Schema
) -> Iterator[pa.RecordBatch | RefusedRecord]:
    """The rows of a task, in order, in bounded batches and the columns of ``schema``; refused records among them."""
    if "ref" in task:
        for batch in reading.scan(root, catalog, Ref.parse(task["ref"]), skip=task["skip"], limit=task["rows"]):
            yield from bounded(reading.conform(batch, schema))
        return
    user = pa.schema([f for f in schema if f.name not in SYSTEM_COLUMNS])
    task_of = from_dict(files.FileTask, task["files"])
    for part in files.read(task_of, user, integer("batch_rows"), integer("batch_bytes"), source=task["source"]):
        yield from part.refused
        yield from bounded(reading.conform(part.batch, schema))


def bounded(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """``batch`` in slices of at most ``batch_rows`` rows and about ``batch_bytes`` bytes."""
    width = max(1, batch.nbytes // max(1, batch.num_rows))
    step = max(1, min(integer("batch_rows"), integer("batch_bytes") // width))
    for start in range(0, batch.num_rows, step):
        yield batch.slice(start, step)
