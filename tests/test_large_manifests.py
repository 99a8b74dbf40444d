"""A version of 100,000 files: its manifest comes in pages that cost little memory, behind a policy as without one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from headrace.exchange import Exchange
from headrace.govern import OWNER
from headrace.model import FileEntry, Principal, Ref, Version
from headrace.policies import View
from headrace.root import Root
from headrace.rows import SYSTEM
from headrace.store.parquet import write_file
from headrace.store.types import describe, encode_schema, to_stored

FILES, UNSEEN, ROWS = 100_000, 3, 10
SCHEMA = pa.schema([("who", pa.string()), ("pay", pa.int64()), *SYSTEM])
PAGES = """
import json, re, sys
from pathlib import Path
from headrace.exchange import Exchange
from headrace.model import Principal, Ref, to_dict
from headrace.root import Root
import orjson

def memory():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

exchange, who = Exchange(Root.at(sys.argv[1])), Principal(sys.argv[2], "consumer")
exchange.catalog.latest("big")
before, most, files, rows, token = memory(), 0, 0, 0, None
while True:
    page = exchange.manifest(who, Ref("big"), page_token=token)
    orjson.dumps(to_dict(page))
    most, files = max(most, memory() - before), files + len(page.files)
    assert not page.files or page.files[0].start == rows
    rows += sum(entry.rows for entry in page.files)
    if token is None:
        first = most
    token = page.next_page_token
    if token is None:
        break
exchange.close()
print(json.dumps({"files": files, "rows": rows, "told": page.rows, "first": first, "most": most}))
"""


def rows(at: int) -> pa.RecordBatch:
    user = [pa.array([f"p{at}"] * ROWS), pa.array(range(ROWS), pa.int64())]
    system = [pa.array([f"{at}-{row}" for row in range(ROWS)]), *(pa.nulls(ROWS, f.type) for f in list(SYSTEM)[1:])]
    return pa.RecordBatch.from_arrays([*user, *system], schema=SCHEMA)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose views are known but for those of the last files, which alone have bytes."""
    folder = tmp_path_factory.mktemp("large") / "root"
    exchange = Exchange(Root.at(folder))
    files = []
    for at in range(FILES):
        digest, size = hashlib.sha256(b"%d" % at).hexdigest(), 1000
        if at >= FILES - UNSEEN:
            written = write_file(folder / "tables/big" / f"part-{at}.parquet", [rows(at)], to_stored(SCHEMA))
            digest, size = written.sha256, written.bytes
        files.append(FileEntry(uuid.uuid4().hex, ROWS, size, digest, at * ROWS, f"part-{at}.parquet"))
    version = Version(
        "big", 0, "2026-01-01T00:00:00Z", "flush", FILES * ROWS, FILES * 1000, FILES, "f" * 64, describe(SCHEMA), 256, 0
    )
    encoded = encode_schema(SCHEMA)
    exchange.catalog.register(version, files, gone=None, arrow_schema=encoded, fingerprint_state="{}")
    exchange.add_policy(OWNER, "big", "principal:ann", "pay % 2 = 0", {"who": "hash"})
    views, ann = exchange._views, Principal("ann", "consumer")
    compiled = views.compiled(views.effective(ann, "big"), SCHEMA)
    views.book.add_views(
        View(
            views._files.id_of("big", entry, compiled),
            compiled.key,
            "big",
            entry.id,
            ROWS // 2,
            500,
            900,
            entry.sha256,
            "",
        )
        for entry in files[:-UNSEEN]
    )
    exchange.close()
    return folder


def pages(root: Path, who: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", PAGES, str(root), who], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_of_a_large_version_only_the_views_that_are_missing_are_made(root: Path) -> None:
    exchange = Exchange(Root.at(root))
    page = exchange.manifest(Principal("ann", "consumer"), Ref("big"))
    assert page.rows == FILES * ROWS // 2
    assert len(list((root / "views").glob("*.parquet"))) == UNSEEN
    exchange.close()


@pytest.mark.slow
@pytest.mark.parametrize(("who", "share"), [("bob", 1), ("ann", 2)])
def test_pages_cost_little_memory(root: Path, who: str, share: int) -> None:
    found = pages(root, who)
    assert (found["files"], found["rows"], found["told"]) == (FILES, FILES * ROWS // share, FILES * ROWS // share)
    assert found["first"] < 50 << 20
    assert found["most"] < 100 << 20
