"""A provider over a folder of Parquet files as an exchange publishes them: widened types, true ones in the manifest."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.errors import NotFound
from headrace.model import FileEntry, Manifest, TracedRow, from_dict, to_dict
from headrace.order import Order

WIDER = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.float16(): pa.float32()}


def at_rest(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(at_rest(kind.value_type))
    return WIDER.get(kind, kind)


def publish(folder: Path, table: pa.Table, files: int = 1, block_rows: int = 16, version: int = 3) -> Path:
    """Write ``table`` as ``files`` Parquet files and a manifest; returns the source to open."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = pa.schema([pa.field(f.name, at_rest(f.type)) for f in table.schema])
    bounds = np.linspace(0, table.num_rows, files + 1).astype(int).tolist()
    entries = []
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        path = folder / f"part-{i}.parquet"
        pq.write_table(table.slice(start, stop - start).cast(stored), path, compression="zstd")
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        entries.append(FileEntry(f"part-{i}", stop - start, len(content), digest, start, path.name))
    manifest = Manifest(
        dataset="corpus",
        version=version,
        fingerprint=hashlib.sha256(repr(table.to_pydict()).encode()).hexdigest(),
        schema=tuple({"name": f.name, "type": str(f.type)} for f in table.schema),
        arrow_schema=base64.b64encode(table.schema.serialize().to_pybytes()).decode(),
        rows=table.num_rows,
        block_rows=block_rows,
        files=tuple(entries),
    )
    (folder / "manifest.json").write_text(json.dumps(to_dict(manifest)))
    return folder / "corpus@3"


class FolderProvider:
    """Serves one folder; notes which files were asked for in ``fetched.log``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def manifest(self, ref, columns):
        return from_dict(Manifest, json.loads((self.folder / "manifest.json").read_text()))

    def fetch(self, entry, into):
        with (self.folder / "fetched.log").open("a") as log:
            log.write(f"{entry.id}\n")
        path = self.folder / entry.path
        if not path.exists():
            raise NotFound(f"no file {entry.id}")
        shutil.copyfile(path, into)

    def trace(self, ref, **query):
        manifest = self.manifest(ref, None)
        order = Order(manifest.rows, query["seed"], query["epoch"], query["shuffle"], manifest.block_rows)
        size = query["batch_size"]
        return [
            TracedRow(int(row), f"id-{row}", ({"locator": f"file#{row}"},), rank, query["step"])
            for rank in range(query["world_size"])
            for row in order.batch(query["step"], size, rank, query["world_size"])
        ]

    def close(self):
        return None

    def fetched(self) -> list[str]:
        log = self.folder / "fetched.log"
        return log.read_text().split() if log.exists() else []


def open_folder(source, token):
    """The opener of these tests: ``FOLDER/REF``."""
    folder, _, ref = str(source).rpartition("/")
    return FolderProvider(Path(folder)), ref
