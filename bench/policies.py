"""What a policy costs: a feed behind one beside the same feed without, and the first page of a very large manifest.

The policy hides half of the rows and masks two columns. Both feeds read over HTTP, in turns, with a cache that is warm
(an epoch after the first) or cold (from opening the feed to its first epoch's end, files fetched and decoded).
"""

from __future__ import annotations

import hashlib
import re
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

HERE = Path(__file__).resolve().parent
ROWS, WIDTH, BATCH, ROUNDS = 200_000, 64, 256, 5
FILES = 100_000


def table(rows: int) -> pa.Table:
    random = np.random.default_rng(0)
    values = random.random((rows, WIDTH), dtype=np.float32)
    return pa.table(
        {
            "features": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), WIDTH),
            "amount": pa.array(random.integers(0, 10_000, rows)),
            "rate": pa.array(random.random(rows)),
            "half": pa.array(np.arange(rows) % 2),
        }
    )


def epoch(source: str, token: str, cache: Path, warm: bool) -> float:
    """Rows per second of one epoch."""
    from headrace.torch import StreamingDataLoader, StreamingDataset

    start = time.perf_counter()
    dataset = StreamingDataset(source, token, batch_size=BATCH, shuffle=True, cache_dir=cache)
    loader = StreamingDataLoader(dataset)
    for _ in range(2 if warm else 1):
        start, seen = time.perf_counter() if warm else start, 0
        for batch in loader:
            seen += len(batch["features"])
    return seen / (time.perf_counter() - start)


def feeds() -> list[dict[str, Any]]:
    """Both feeds in turns; the ratio is that of the medians."""
    from uploads import exchange

    import headrace

    found: dict[tuple[str, bool], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder, exchange(Path(folder) / "root") as (url, _):
        with headrace.connect(str(Path(folder) / "root")) as admin:
            part = table(ROWS // 4)
            for at in range(4):
                admin.upload("rows", part)
                while (admin.dataset("rows").info.version or 0) < at or admin.dataset("rows").info.pending:
                    time.sleep(0.05)
            admin.add_policy("rows", "principal:half", "half = 0", {"amount": "bucket:10", "rate": "bucket:0.01"})
            tokens = {name: str(admin.create_token(name).secret) for name in ("whole", "half")}
        for at in range(ROUNDS):
            for warm in (False, True):
                for name in tokens if at % 2 else reversed(tokens):
                    cache = Path(folder) / (f"cache-{name}" if warm else f"cold-{name}-{at}")
                    found.setdefault((name, warm), []).append(epoch(f"{url}/rows@latest", tokens[name], cache, warm))
    rows = []
    for warm in (True, False):
        ours, whole = (statistics.median(found[name, warm]) for name in ("half", "whole"))
        rows.append(
            {
                "name": f"feed behind a policy, {'warm' if warm else 'cold'} cache",
                "value": ours,
                "unit": "rows/s",
                "peer": "the same without a policy",
                "peer_value": whole,
                "ratio": ours / whole,
                "target": ">= 0.9",
            }
        )
    return rows


def memory() -> float:
    status = Path("/proc/self/status")
    return int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1]) / 1024 if status.exists() else 0.0  # type: ignore[index]


def manifests() -> list[dict[str, Any]]:
    """The first page of a version of 100,000 files whose views are known."""
    from headrace.exchange import Exchange
    from headrace.govern import OWNER
    from headrace.model import FileEntry, Principal, Ref, Version
    from headrace.policies import View
    from headrace.root import Root
    from headrace.rows import SYSTEM
    from headrace.store.types import describe, encode_schema

    schema = pa.schema([("who", pa.string()), ("pay", pa.int64()), *SYSTEM])
    rows = []
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        place = Exchange(Root.at(folder))
        files = [
            FileEntry(uuid.uuid4().hex, 10, 1000, hashlib.sha256(b"%d" % at).hexdigest(), at * 10, f"part-{at}.parquet")
            for at in range(FILES)
        ]
        version = Version("big", 0, "", "flush", FILES * 10, FILES * 1000, FILES, "f" * 64, describe(schema), 256, 0)
        place.catalog.register(version, files, gone=None, arrow_schema=encode_schema(schema), fingerprint_state="{}")
        place.add_policy(OWNER, "big", "principal:half", "pay % 2 = 0", {"who": "hash", "pay": "bucket:10"})
        views = place._views
        found = views.effective(Principal("half", "consumer"), "big")
        assert found is not None
        key = views.compiled(found, schema).key
        views.book.add_views(
            View(f"v{uuid.uuid4().hex}", key, "big", one.id, 5, 500, 900, one.sha256, "") for one in files
        )
        del files
        for name in ("whole", "half"):
            who = Principal(name, "consumer")
            place.version(who, Ref("big"))
            before, times = memory(), []
            for _ in range(5):
                began = time.perf_counter()
                place.manifest(who, Ref("big"))
                times.append(time.perf_counter() - began)
            policy = " behind a policy" if name == "half" else ""
            what = f"first page of {FILES:,} files{policy}; +{max(0.0, memory() - before):.0f} MB"
            rows.append({"name": what, "value": statistics.median(times), "unit": "s", "target": "<= 0.5"})
        place.close()
    return rows


def run() -> list[dict[str, Any]]:
    """Rows for the table of ``make bench``."""
    sys.path.insert(0, str(HERE))
    return [*feeds(), *manifests()]


if __name__ == "__main__":
    for line in run():
        print(line)
