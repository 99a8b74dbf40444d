"""Samples per second of a shuffled feed of tokens: Headrace, LitData's TokensLoader, and a bare NumPy gather from RAM.

50,000 rows of 1,024 uint16 tokens, int64 batches of 32, warm cache, one process, no workers. Each contender runs in a
process of its own, in turns; an epoch is timed from making the iterator to its end, and the best of several counts.
LitData runs in ``bench/.venv`` where it is installed (see requirements.txt), else in this environment if it has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

ROWS, LENGTH, BATCH, FILES, EPOCHS, ROUNDS = 50_000, 1024, 32, 4, 3, 3
HERE = Path(__file__).resolve().parent


def tokens() -> Any:
    return np.random.default_rng(0).integers(0, 50_257, (ROWS, LENGTH), dtype=np.uint16)


def best(epoch: Callable[[], Iterable[Any]]) -> float:
    """Samples per second of the fastest epoch after one that warms up."""
    times = []
    for _ in range(EPOCHS + 1):
        start, seen = time.perf_counter(), 0
        for batch in epoch():
            seen += len(batch)
        times.append((time.perf_counter() - start) / seen)
    return 1 / min(times[1:])


def gather(_: Path) -> float:
    """What the machine can do: one array in RAM, one fancy index and one cast per batch."""
    array, random = tokens(), np.random.default_rng(1)

    def epoch() -> Iterable[Any]:
        order = random.permutation(ROWS)
        for start in range(0, ROWS - BATCH + 1, BATCH):
            yield array[order[start : start + BATCH]].astype(np.int64)

    return best(epoch)


def headrace(folder: Path, files: int = FILES) -> float:
    import pyarrow as pa
    import torch

    sys.path.insert(0, str(HERE.parent / "tests"))
    from headrace.torch import StreamingDataLoader, StreamingDataset
    from parquet_provider import open_folder, publish

    data = folder / f"headrace-{files}"
    if not data.exists():
        table = pa.table({"tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens().reshape(-1)), LENGTH)})
        publish(data, table, files=files, block_rows=8192)
    dataset = StreamingDataset(
        str(data / "corpus@3"), batch_size=BATCH, shuffle=True, cache_dir=folder / "cache", opener=open_folder
    )
    loader = StreamingDataLoader(dataset)

    def epoch() -> Iterable[Any]:
        for batch in loader:
            found = batch["tokens"]
            assert found.dtype == torch.int64
            yield found

    return best(epoch)


def litdata_samples(index: int) -> Iterable[Any]:
    import torch

    array = np.load(Path(tempfile.gettempdir()) / "headrace-bench-tokens.npy", mmap_mode="r")
    for row in array[index * 5000 : (index + 1) * 5000]:
        yield torch.from_numpy(row.copy())


def litdata(folder: Path) -> float:
    import torch
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    data, source = folder / "litdata", Path(tempfile.gettempdir()) / "headrace-bench-tokens.npy"
    if not data.exists():
        np.save(source, tokens())
        optimize(
            litdata_samples,
            inputs=list(range(ROWS // 5000)),
            output_dir=str(data),
            chunk_bytes="64MB",
            num_workers=1,
            item_loader=TokensLoader(block_size=LENGTH),
            start_method="fork",
        )
        source.unlink()
    dataset = StreamingDataset(
        str(data), item_loader=TokensLoader(block_size=LENGTH), shuffle=True, drop_last=True, seed=1
    )
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)

    def epoch() -> Iterable[Any]:
        for batch in loader:
            yield batch.to(torch.int64)

    return best(epoch)


CONTENDERS: dict[str, Callable[[Path], float]] = {"gather": gather, "headrace": headrace, "litdata": litdata}


def peers_python() -> str:
    own = HERE / ".venv" / "bin" / "python"
    return str(own) if own.exists() else sys.executable


def measure(name: str, folder: Path) -> float | None:
    """One contender in a fresh process, or None if it is not installed."""
    python = peers_python() if name == "litdata" else sys.executable
    done = subprocess.run(
        [python, __file__, "--only", name, "--folder", str(folder)], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        if "No module named 'litdata'" in done.stderr:
            return None
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["samples_per_s"])


def run() -> list[dict[str, Any]]:
    """One line per contender: name, samples_per_s (median of the rounds), ratios to LitData and to the bare gather."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        found: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for name in CONTENDERS:
                speed = measure(name, Path(folder))
                if speed is not None:
                    found.setdefault(name, []).append(speed)
    speeds = {name: float(np.median(values)) for name, values in found.items()}
    titles = {
        "gather": "bare NumPy gather from one RAM array",
        "headrace": f"headrace.torch.StreamingDataLoader, {FILES} files",
        "litdata": "litdata TokensLoader + StreamingDataLoader",
    }
    return [
        {
            "name": titles[name],
            "samples_per_s": round(speed),
            "ratio": round(speed / speeds["litdata"], 2) if "litdata" in speeds else None,
            "ratio_to_gather": round(speed / speeds["gather"], 2),
        }
        for name, speed in speeds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=CONTENDERS)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.only:
        print(json.dumps({"samples_per_s": CONTENDERS[options.only](options.folder)}))
        return
    title = f"feed: {ROWS} x {LENGTH} uint16 tokens, batches of {BATCH}"
    print(f"{title:58} {'samples/s':>10} {'x litdata':>10} x gather")
    for line in run():
        ratio = "-" if line["ratio"] is None else f"{line['ratio']:.1f}"
        print(f"{line['name']:58} {line['samples_per_s']:>10,} {ratio:>10} {line['ratio_to_gather']:.2f}")


if __name__ == "__main__":
    main()
