"""Documents of tokens into rows of one length, each of which knows the documents it was cut from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import BadRecipe
from headrace.steps import Carried, SequentialStep, column

Ints = npt.NDArray[np.int64]

PART = pa.struct(
    [pa.field("id", pa.string()), pa.field("start", pa.int32()), pa.field("length", pa.int32())],
)
"""One stretch of a packed row: ``length`` tokens of document ``id`` from its token ``start`` on."""


@dataclass(frozen=True)
class Pack(SequentialStep):
    """Join the documents of a split in order and cut rows of exactly ``pack`` tokens; what remains is dropped.

    A row has the tokens, ``_sources`` (list of ``PART``), ``_id`` (32 hex digits of the sha256 over the lines
    "id TAB start TAB length"), the ``_source`` of its first document and the latest ``_ingested_at``.
    """

    name: ClassVar[str] = "pack"

    pack: int
    into: str = "tokens"

    def advance(self, batch: pa.RecordBatch, carried: Carried) -> tuple[pa.RecordBatch, Carried]:
        """Finished rows of ``batch`` after the rest of its split; less than one row per split is carried."""
        split = _split(batch)
        documents = self._documents(batch)
        counts = dict(carried.counts)
        arrived = len(documents.column("tokens").values) if documents.num_rows else 0
        if split in carried.rows:
            documents = pa.concat_batches([carried.rows[split], documents])
        rows, rest = self._cut(documents)
        if "_split" in batch.schema.names:
            rows = rows.append_column("_split", pa.array([split] * rows.num_rows, pa.string()))
        counts["tokens_in"] = counts.get("tokens_in", 0) + arrived
        counts["tokens_out"] = counts.get("tokens_out", 0) + rows.num_rows * self.pack
        return rows, Carried({**carried.rows, split: rest}, counts)

    def finish(self, carried: Carried) -> tuple[list[pa.RecordBatch], Carried]:
        """No rows; the counts with ``tokens_dropped``."""
        counts = {"tokens_in": 0, "tokens_out": 0, **carried.counts}
        counts["tokens_dropped"] = counts["tokens_in"] - counts["tokens_out"]
        return [], Carried({}, counts)

    def _documents(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Only what packing needs: ``tokens``, ``start``, ``_id``, and the origin where there is one."""
        tokens = column(batch, self.into, self.name)
        if not (pa.types.is_list(tokens.type) and pa.types.is_integer(tokens.type.value_type)):
            raise BadRecipe(f"step 'pack': column {self.into!r} is {tokens.type}, not tokens", hint="tokenize first")
        # A fresh array: its values begin at 0 and nulls are empty, whatever slice the batch was.
        lengths = pc.fill_null(pc.list_value_length(tokens), 0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        columns = {
            "tokens": pa.ListArray.from_arrays(offsets, pc.list_flatten(tokens)),
            "start": pa.array(np.zeros(batch.num_rows, dtype=np.int32)),
        }
        for name in ("_id", "_source", "_ingested_at"):
            if name in batch.schema.names:
                columns[name] = batch.column(name)
        return pa.record_batch(columns)

    def _cut(self, documents: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        """Full rows, and the documents that remain, the first of them from the token it was cut at."""
        tokens = documents.column("tokens")
        flat = tokens.values.to_numpy(zero_copy_only=False)
        bounds = tokens.offsets.to_numpy().astype(np.int64)
        begun = documents.column("start").to_numpy().astype(np.int64)
        count = len(flat) // self.pack
        used = count * self.pack
        # Stretches begin where a document or a row begins; documents without tokens add no point of their own.
        points = np.unique(np.concatenate([bounds[bounds < used], np.arange(0, used, self.pack)])).astype(np.int64)
        owner = np.searchsorted(bounds, points, side="right") - 1
        parts = pa.StructArray.from_arrays(
            [
                documents.column("_id").take(pa.array(owner)),
                pa.array((points - bounds[owner] + begun[owner]).astype(np.int32)),
                pa.array(np.diff(points, append=used).astype(np.int32)),
            ],
            fields=list(PART),
        )
        firsts = np.searchsorted(points, np.arange(0, used, self.pack))
        rows = self._rows(documents, flat[:used], parts, owner, firsts)
        return rows, self._rest(documents, flat[used:], bounds, begun, used)

    def _rows(
        self, documents: pa.RecordBatch, flat: npt.NDArray[Any], parts: pa.StructArray, owner: Ints, firsts: Ints
    ) -> pa.RecordBatch:
        offsets = np.append(firsts, len(parts))
        columns = {
            self.into: pa.FixedSizeListArray.from_arrays(pa.array(flat), self.pack),
            "_id": pa.array(_ids(parts, offsets), pa.string()),
        }
        if "_source" in documents.schema.names:
            columns["_source"] = documents.column("_source").take(pa.array(owner[firsts]))
        if "_ingested_at" in documents.schema.names:
            times = documents.column("_ingested_at")
            moments = pc.fill_null(times.cast(pa.int64()), 0).to_numpy()[owner]
            latest = np.maximum.reduceat(moments, firsts) if len(firsts) else moments[:0]
            columns["_ingested_at"] = pa.array(latest).cast(times.type)
        columns["_sources"] = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), parts)
        return pa.record_batch(columns)

    def _rest(
        self, documents: pa.RecordBatch, flat: npt.NDArray[Any], bounds: Ints, begun: Ints, used: int
    ) -> pa.RecordBatch:
        first = int(np.searchsorted(bounds, used, side="right")) - 1
        if not len(flat):
            return documents.slice(0, 0)
        rest = documents.slice(first)
        starts = begun[first:].copy()
        starts[0] += used - bounds[first]
        offsets = np.maximum(bounds[first:] - used, 0).astype(np.int32)
        columns: Mapping[str, pa.Array] = {
            **{name: rest.column(name) for name in rest.schema.names},
            "tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)),
            "start": pa.array(starts.astype(np.int32)),
        }
        # Through a copy, so that a few left-over tokens do not keep a whole batch in memory.
        return pa.record_batch(dict(columns)).take(pa.array(np.arange(rest.num_rows)))


def _split(batch: pa.RecordBatch) -> str:
    if "_split" not in batch.schema.names or not batch.num_rows:
        return ""
    return str(batch.column("_split")[0].as_py() or "")


def _ids(parts: pa.StructArray, offsets: Ints) -> list[str]:
    """The ``_id`` of each packed row: one hash per row over the text of its parts."""
    ids, starts, lengths = (parts.field(at).cast(pa.large_string()) for at in range(3))
    ends = pa.scalar("\n", pa.large_string())
    lines = pc.binary_join_element_wise(ids, starts, lengths, pa.scalar("\t", pa.large_string()))
    lines = pc.binary_join_element_wise(lines, ends, pa.scalar("", pa.large_string()))
    if not len(lines):
        return []
    places = np.frombuffer(lines.buffers()[1], dtype=np.int64)[lines.offset :][offsets]
    view = memoryview(lines.buffers()[2])
    cuts = places.tolist()
    return [hashlib.sha256(view[a:b]).hexdigest()[:32] for a, b in pairwise(cuts)]
