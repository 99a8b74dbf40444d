"""Delta tables on a local disk: one atomic, durable commit per call, exactly once per application transaction.

``DataFile(path, rows, bytes, sha256, stats="", start=0, split=None)``: path relative to the table's folder
``Table(path, disk=DISK)``
  ``.exists() -> bool`` · ``.version -> int | None`` · ``.schema() -> Schema`` (stored) · ``.files() -> list[DataFile]`` by start
  ``.create_or_append(files, schema, app=None, meta=None, removes=(), compacted=(), expected=None) -> int`` (Delta version)
  ``.overwrite(files, schema, app=None, meta=None, expected=None) -> int``
  ``.transaction(app_id) -> int | None`` · ``.history(since=-1) -> list[Commit]`` (later than ``since``, oldest first)
  ``.recover() -> list[Path]``: what an interrupted commit left behind, moved aside
``Commit(version, timestamp_ms, app, meta, added, removed)``
  ``.write(name, batches, schema, start=0, split=None, row_group_rows=None) -> DataFile``: a durable file below the table, not yet committed
"""
