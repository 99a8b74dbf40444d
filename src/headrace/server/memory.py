"""How a long-lived process keeps the memory that large uploads need again and again."""

from __future__ import annotations

import ctypes
import sys

import pyarrow as pa

from headrace.settings import MiB

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def reuse_memory() -> None:
    """Called first thing: freed memory is used again, not given back at once only to be faulted in page by page.

    Half the time of a large flush went into such faults. What is kept goes back when the process comes to rest, by
    ``pyarrow.MemoryPool.release_unused``. Where the C library is another than glibc, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    mallopt(_TRIM_THRESHOLD, 512 * MiB)
    mallopt(_MMAP_THRESHOLD, 32 * MiB)
    mallopt(_ARENA_MAX, 4)
    pa.set_memory_pool(pa.system_memory_pool())
