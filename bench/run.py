"""Every benchmark beside its peers in one table: printed, and written to bench/RESULTS.md with the machine."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PARTS = ("uploads", "feed", "policies")
LIBRARIES = ("pyarrow", "numpy", "torch", "daft", "deltalake", "granian", "fastapi", "polars")
PEERS = ("litdata", "flask", "torch")


def processor() -> str:
    """The processor's name, as the system tells it."""
    if sys.platform == "darwin":
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        ).stdout.strip()
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)


def peer_versions() -> str:
    python = HERE / ".venv/bin/python"
    if not python.exists():
        return "not installed"
    code = f"import importlib.metadata as m; print(', '.join(n + ' ' + m.version(n) for n in {PEERS!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def machine() -> list[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    return [
        f"- {processor()}, {os.cpu_count()} cores, {memory_gib():.0f} GiB; load when it began {os.getloadavg()[0]:.1f}",
        f"- {platform.platform()}, Python {platform.python_version()}",
        f"- {versions}",
        f"- peers: {peer_versions()}",
    ]


def shown(value: Any, unit: str = "") -> str:
    if value is None or value == "":
        return ""
    number = value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.2f}"
    return f"{number} {unit}".strip()


def feed_rows(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The feed's contenders as rows of the common table: Headrace beside each of the others."""
    speeds = {line["name"].split()[0].split(".")[0]: line for line in found}
    ours = next(line for line in found if line["name"].startswith("headrace"))
    return [
        {
            "name": "feed: 50,000 x 1,024 tokens, shuffled, int64 batches of 32",
            "value": ours["samples_per_s"],
            "unit": "samples/s",
            "peer": peer["name"],
            "peer_value": peer["samples_per_s"],
            "ratio": ours["samples_per_s"] / peer["samples_per_s"],
            "target": ">= 5" if name == "litdata" else "",
        }
        for name, peer in speeds.items()
        if peer is not ours
    ]


def measured(part: str) -> list[dict[str, Any]]:
    """The rows of one part; it runs in this process, its contenders in theirs."""
    sys.path.insert(0, str(HERE))
    module = __import__(part)
    rows = module.run()
    return feed_rows(rows) if part == "feed" else rows


def line_of(row: Mapping[str, Any]) -> list[str]:
    unit = str(row.get("unit") or "")
    ratio = row.get("ratio")
    return [
        str(row["name"]),
        shown(row["value"], unit),
        str(row.get("peer") or ""),
        shown(row.get("peer_value"), unit),
        "" if ratio is None else f"{ratio:.2f}x",
        str(row.get("target") or ""),
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [["what", "headrace", "peer", "peer's", "ratio", "target"], *map(line_of, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    told = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([told[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *told[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, help="measure one part, and leave RESULTS.md alone")
    only = parser.parse_args().only
    about, began, rows = machine(), time.monotonic(), []
    for part in [only] if only else PARTS:
        print(f"measuring {part} …", flush=True)
        rows.extend(measured(part))
    text = table(rows)
    print("\n".join(["", *about, "", text]))
    if only is None:
        when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        took = f"{when}, {time.monotonic() - began:.0f} s; peers ran on the same machine in the same run."
        head = ["# Benchmarks", "", f"Written by `make bench`, {took}", "", *about, ""]
        (HERE / "RESULTS.md").write_text("\n".join([*head, text, ""]), encoding="utf-8")
        print(f"\nwritten to {HERE / 'RESULTS.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
