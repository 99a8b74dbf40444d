"""The feed: a manifest read in a deterministic order, as batches of NumPy arrays; knows no framework."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
import pyarrow as pa

from headrace import settings
from headrace.client.cache import Cache, Lease, default_folder, parse_bytes, true_schema
from headrace.client.gather import Column, Pool, Scratch, columns, pools
from headrace.errors import BadRequest, Conflict, Damaged, HeadraceError, TooNew, Unreachable
from headrace.model import WIRE, FileEntry, Manifest, TracedRow
from headrace.order import Ints, Order, Shuffle

PROVIDERS = "headrace.providers"
DtypeLike: TypeAlias = Any
_STATE = ("wire", "ref", "fingerprint", "seed", "epoch", "samples", "shuffle", "block_rows", "window_blocks")
_PLAN_ROWS = 8192
_POOL_BYTES = 1 << 21
_AHEAD_BYTES = 1 << 28
_MAPPED_MAX = 256
_JOINED_BYTES = 1 << 28


@runtime_checkable
class Provider(Protocol):
    """Where a feed gets manifests and files from: an exchange over HTTP, or an embedded one. Threads share it."""

    def manifest(self, ref: str, columns: Sequence[str] | None) -> Manifest:
        """The whole manifest of ``ref``, all pages joined. ``columns`` None: all user columns."""
        ...

    def fetch(self, entry: FileEntry, into: Path) -> None:
        """Write the bytes of one data file to the path ``into``. The caller checks size and hash. Must time out."""
        ...

    def trace(self, ref: str, **query: Any) -> list[TracedRow]:
        """The rows of a training step with their sources; ``query`` as in the REST interface."""
        ...

    def close(self) -> None:
        """Release connections; the provider is not used afterwards."""
        ...


OpenProvider: TypeAlias = Callable[[str, str | None], tuple[Provider, str]]


def open_provider(source: str, token: str | None = None) -> tuple[Provider, str]:
    """Find who serves ``source`` (``http://host:port/REF`` or ``ROOT/REF``) and return it with the ref.

    Providers are entry points of the group ``headrace.providers``: ``http`` for URLs, ``file`` for all else, each a
    callable ``(source, token) -> (provider, ref)``. Raises BadRequest where none is installed.
    """
    scheme = "http" if source.startswith(("http://", "https://")) else "file"
    for entry in entry_points(group=PROVIDERS, name=scheme):
        try:
            found: OpenProvider = entry.load()
        except ImportError as error:
            hint = 'pip install "headrace[server]" to read a local root, or give the URL of an exchange'
            raise BadRequest(f"{source!r} cannot be opened: {error}", hint=hint) from error
        return found(source, token)
    raise BadRequest(f"nothing installed here opens {source!r}", hint="reinstall headrace")


@dataclass
class Progress:
    """Which epoch comes next and how far it is consumed: every new iteration is the next epoch unless one was set."""

    epoch: int = 0
    samples: int = 0
    begun: bool = False
    loads: int = 0

    def begin(self) -> tuple[int, int]:
        """The epoch and the global samples at which the iteration that starts now begins."""
        if self.begun:
            self.epoch, self.samples = self.epoch + 1, 0
        self.begun = True
        return self.epoch, self.samples

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is ``epoch``: from its loaded place if a state of that epoch was just loaded."""
        if epoch < 0:
            raise BadRequest(f"epoch {epoch} is below 0")
        if self.begun or epoch != self.epoch:
            self.epoch, self.samples, self.begun = epoch, 0, False

    def load(self, epoch: int, samples: int) -> None:
        """The next iteration starts there; iterations that run now must not go on."""
        self.epoch, self.samples, self.begun, self.loads = epoch, samples, False, self.loads + 1


class Feed:
    """One ref as batches of NumPy arrays, in an order that is arithmetic on (seed, epoch, rank, world size).

    Integers come as int64 and floats as float32 unless ``dtype`` (one for all, or by column) says otherwise; fixed-size
    lists are stacked, strings, bytes and ragged lists are lists, structs are dicts. The data is the version that
    ``source`` named when the feed was made. Survives fork and spawn: connections, mapped files and threads are made
    where they are used; the token travels with a pickled feed, because workers fetch too. ``opener`` finds providers.
    """

    _pid: int
    _provider: Provider | None
    _threads: ThreadPoolExecutor | None
    _held: OrderedDict[int, tuple[dict[str, Column], Lease]]
    _joined: dict[str, Column] | None

    def __init__(
        self,
        source: str,
        token: str | None = None,
        *,
        columns: Sequence[str] | None = None,
        batch_size: int = 32,
        shuffle: Shuffle | bool = True,
        seed: int = 0,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        cache_dir: str | Path | None = None,
        cache_limit: str | int | None = None,
        prefetch: int = 4,
        dtype: DtypeLike = None,
        window_blocks: int = 8,
        opener: OpenProvider = open_provider,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size or prefetch < 0:
            shape = f"batch_size {batch_size}, rank {rank} of {world_size}, prefetch {prefetch}"
            raise BadRequest(f"a feed of {shape} is not possible")
        self.source, self.batch_size, self.drop_last = source, batch_size, drop_last
        self.rank, self.world_size, self.prefetch = rank, world_size, prefetch
        self._token = token
        self._reset()
        self._opener = opener
        provider, self.ref = opener(source, token)
        self._provider = provider
        self.manifest = provider.manifest(self.ref, columns)
        self.schema = true_schema(self.manifest, columns)
        self._dtypes = _dtypes(dtype, self.schema.names)
        self.cache = Cache(
            Path(cache_dir) if cache_dir is not None else default_folder(),
            parse_bytes(cache_limit) if cache_limit is not None else settings.integer("cache_bytes"),
        )
        self._ends = _ends(self.manifest)
        self._order = Order(self.rows, seed, 0, cast(Shuffle, shuffle), self.manifest.block_rows, window_blocks)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._provider = None
        self._threads = None
        self._held = OrderedDict()
        self._joined = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_pid", "_provider", "_threads", "_held", "_joined"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def rows(self) -> int:
        """Rows of the ref."""
        return self.manifest.rows

    @property
    def pinned(self) -> str:
        """The ref with its version number."""
        found = self.manifest
        return f"{found.dataset}@{found.version}" + (f":{found.split}" if found.split else "")

    def reorder(self, order: Order) -> None:
        """Read in the order of ``order`` from now on."""
        self._order = order

    def order(self, epoch: int) -> Order:
        """The order of one epoch."""
        return replace(self._order, epoch=epoch)

    def steps(self, first: int = 0) -> int:
        """Batches of this rank (and of every other) in one epoch, from global sample ``first``."""
        return self._order.steps(self.batch_size, self.world_size, self.drop_last, first)

    def state(self, epoch: int, samples: int) -> dict[str, Any]:
        """Everything that a later run needs to go on, JSON; at an epoch's end it names the beginning of the next."""
        if samples and not self.steps(samples):
            epoch, samples = epoch + 1, 0
        order = self._order
        return {
            "wire": WIRE,
            "ref": self.pinned,
            "fingerprint": self.manifest.fingerprint,
            "seed": order.seed,
            "epoch": epoch,
            "samples": samples,
            "shuffle": order.shuffle,
            "block_rows": order.block_rows,
            "window_blocks": order.window_blocks,
        }

    def load(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """Take the order of ``state`` over (its seed and shuffle win); return its epoch and samples.

        Raises Conflict if it belongs to other data, TooNew if to a newer Headrace, BadRequest if it is no state.
        """
        missing = [name for name in _STATE if name not in state]
        if missing:
            raise BadRequest(f"this is not a feed's state: no {missing[0]!r}")
        if state["wire"] > WIRE:
            raise TooNew(f"the state has wire version {state['wire']}, this client {WIRE}", hint="upgrade headrace")
        if state["fingerprint"] != self.manifest.fingerprint:
            raise Conflict(
                f"the state belongs to {state['ref']} (content {state['fingerprint']}) and "
                f"this feed reads {self.pinned} (content {self.manifest.fingerprint})",
                hint=f"open {state['ref']} to go on, or start without the state",
            )
        samples = int(state["samples"])
        if not 0 <= samples <= self.rows + self.batch_size * self.world_size:
            raise BadRequest(f"the state has consumed {samples} samples of {self.rows}")
        shuffle, block_rows, window_blocks = state["shuffle"], int(state["block_rows"]), int(state["window_blocks"])
        self._order = Order(self.rows, int(state["seed"]), 0, shuffle, block_rows, window_blocks)
        return int(state["epoch"]), samples

    def batches(self, epoch: int = 0, first: int = 0, worker: int = 0, workers: int = 1) -> Iterator[dict[str, Any]]:
        """This rank's batches from global sample ``first`` on; worker w of W makes steps w, w + W, …"""
        order, size = self.order(epoch), self.batch_size
        mine = np.arange(worker, self.steps(first), workers, dtype=np.int64)
        planned = max(1, _PLAN_ROWS // size)
        self._join()
        ahead, until, scratch = _Ahead(self, order, first), 0, Scratch()
        for start in range(0, len(mine), planned):
            steps = mine[start : start + planned]
            positions = order.batch_positions(steps, size, self.rank, self.world_size, first).reshape(-1)
            rows = order.rows_at(positions)
            together = max(1, _POOL_BYTES // (self.memory_bytes(rows) * size)) * size
            a = 0
            while a < len(rows):
                if positions[a] >= until:
                    until = next(order.spans(int(positions[a])))[0]
                if self._joined is None:
                    ahead.advance(int(positions[a]))
                # Rows of the next window wait, as their files may still be on their way.
                inside = int(np.count_nonzero(positions[a : a + together] < until))
                b = a + -(-inside // size) * size
                found = self._pools(rows[a:b], scratch)
                for c in range(0, b - a, size):
                    yield {name: pool.batch(c, c + size) for name, pool in found.items()}
                a = b

    def memory_bytes(self, rows: Ints) -> int:
        """Mapped bytes of one row, by the file of the first of ``rows``; at least 1."""
        if self._joined is not None:
            return 1
        index = int(np.searchsorted(self._ends, rows[0], side="right"))
        return max(1, self._open(index)[1].bytes // max(1, self.manifest.files[index].rows))

    def row(self, index: int) -> dict[str, Any]:
        """Stored row ``index`` (negative counts from the end); raises IndexError beyond the rows."""
        at = index + self.rows if index < 0 else index
        if not 0 <= at < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        found = self._pools(np.array([at], dtype=np.int64), {})
        return {name: _first(pool.batch(0, 1)) for name, pool in found.items()}

    def trace(self, epoch: int, step: int) -> list[TracedRow]:
        """The rows of one step of all ranks, with the source records behind them."""
        return self.provider().trace(
            self.pinned,
            step=step,
            seed=self._order.seed,
            epoch=epoch,
            batch_size=self.batch_size,
            world_size=self.world_size,
            shuffle=self._order.shuffle,
        )

    def _join(self) -> None:
        """Hold a small ref whose files are all here as one record batch in memory: batches come straight from it."""
        files = self.manifest.files
        if self._joined is not None or not 0 < len(files) <= _MAPPED_MAX or sum(e.bytes for e in files) > _JOINED_BYTES:
            return
        if not all(self.cache.holds(entry, self.schema) for entry in files):
            return
        found = [self._open(index) for index in range(len(files))]
        if len(found) == 1:
            self._joined = found[0][0]
        elif sum(lease.bytes for _, lease in found) <= _JOINED_BYTES:
            table = pa.Table.from_batches([lease.batch for _, lease in found]).combine_chunks()
            joined = table.to_batches()
            if len(joined) == 1:
                self._joined = columns(joined[0], self._dtypes)
                self._held.clear()

    def _pools(self, rows: Ints, scratch: Scratch) -> dict[str, Pool]:
        if self._joined is not None:
            return pools([(self._joined, rows)], np.arange(len(rows), dtype=np.int64), scratch)
        ascending = np.argsort(rows)
        wanted = rows[ascending]
        files = np.searchsorted(self._ends, wanted, side="right")
        cuts = [0, *(np.flatnonzero(files[1:] != files[:-1]) + 1).tolist(), len(rows)]
        used = files[cuts[:-1]].tolist()
        missing = [self.manifest.files[index] for index in used if index not in self._held]
        if self.prefetch and len(missing) > 1:
            for entry in missing:
                if not self.cache.holds(entry, self.schema):
                    self.fetch_soon(entry)
        parts = []
        for index, a, b in zip(used, cuts[:-1], cuts[1:], strict=True):
            parts.append((self._open(index)[0], wanted[a:b] - self.manifest.files[index].start))
        place = np.empty(len(rows), dtype=np.int64)
        place[ascending] = np.arange(len(rows))
        return pools(parts, place, scratch)

    def provider(self) -> Provider:
        """The provider of this process."""
        if self._pid != os.getpid():
            held, joined = self._held, self._joined
            self._reset()
            self._held, self._joined = held, joined  # mapped files are as good in a forked child
        if self._provider is None:
            self._provider = self._opener(self.source, self._token)[0]
        return self._provider

    def _fetch(self, entry: FileEntry, into: Path) -> None:
        self.provider().fetch(entry, into)

    def _open(self, index: int) -> tuple[dict[str, Column], Lease]:
        held = self._held.get(index)
        if held is not None:
            self._held.move_to_end(index)
            return held
        entry = self.manifest.files[index]
        where = f"rank {self.rank}: file {entry.id} of {self.ref}"
        try:
            lease = self.cache.open(entry, self.schema, self._fetch)
            held = columns(lease.batch, self._dtypes), lease
        except HeadraceError as error:
            raise type(error)(f"{where}: {error.message}", hint=error.hint, details=error.details) from error
        except OSError as error:
            raise Unreachable(f"{where}: {error}", hint=f"is there space in {self.cache.folder}?") from error
        self._held[index] = held
        # Files kept mapped cannot be evicted: leave the cache room within its limit.
        while len(self._held) > 1 and (
            len(self._held) > _MAPPED_MAX or sum(kept.bytes for _, kept in self._held.values()) > self.cache.limit
        ):
            self._held.popitem(last=False)
        return held

    def fetch_soon(self, entry: FileEntry) -> Future[Path]:
        """Bring one file into the cache in the background. A failure shows when the file is opened."""
        self.provider()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(max_workers=max(1, min(4, self.prefetch)), thread_name_prefix="headrace")
        return self._threads.submit(self.cache.ensure, entry, self.schema, self._fetch)

    def file_span(self, start: int, stop: int) -> range:
        """Indices of the files that hold rows [start, stop)."""
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        return range(first, last + 1)

    def close(self) -> None:
        """Give back files, threads and connections; the feed opens them again when used again."""
        if self._pid == os.getpid():
            if self._threads is not None:
                self._threads.shutdown(wait=False, cancel_futures=True)
            if self._provider is not None:
                self._provider.close()
        self._reset()


@dataclass(frozen=True, slots=True)
class _Awaited:
    until: int
    index: int
    bytes: int
    future: Future[Path] | None


class _Ahead:
    """Files that the epoch needs next, fetched in the background: at most ``prefetch`` of them and 256 MiB at once."""

    def __init__(self, feed: Feed, order: Order, first: int) -> None:
        self._feed, self._order = feed, order
        self._needs = self._walk(first)
        self._waiting: list[_Awaited] = []

    def _walk(self, first: int) -> Iterator[tuple[int, int]]:
        for until, start, stop in self._order.spans(first):
            for index in self._feed.file_span(start, stop):
                yield until, index

    def advance(self, position: int) -> None:
        """The feed is at ``position``: forget what lies behind, start what comes next."""
        feed = self._feed
        waiting = [item for item in self._waiting if item.until > position and item.index not in feed._held]
        size = sum(item.bytes for item in waiting if item.future is not None and not item.future.done())
        while len(waiting) < feed.prefetch and size < _AHEAD_BYTES:
            need = next(self._needs, None)
            if need is None:
                break
            until, index = need
            entry = feed.manifest.files[index]
            if until <= position or index in feed._held:
                continue
            future = None if feed.cache.holds(entry, feed.schema) else feed.fetch_soon(entry)
            waiting.append(_Awaited(until, index, entry.bytes, future))
            size += entry.bytes if future else 0
        self._waiting = waiting


def _first(values: Any) -> Any:
    return {name: _first(part) for name, part in values.items()} if isinstance(values, dict) else values[0]


def _dtypes(dtype: DtypeLike, names: Sequence[str]) -> dict[str, np.dtype[Any]]:
    if dtype is None:
        return {}
    asked = dtype if isinstance(dtype, Mapping) else {"*": dtype}
    unknown = [name for name in asked if name != "*" and name not in names]
    if unknown:
        raise BadRequest(f"dtype names column {unknown[0]!r}", hint=f"there are: {', '.join(names)}")
    try:
        found = {name: np.dtype(kind) for name, kind in asked.items()}
    except TypeError as error:
        raise BadRequest(f"dtype: {error}", hint='a NumPy type such as "float16", or one per column') from error
    if wrong := [name for name, kind in found.items() if kind.kind not in "iufb"]:
        raise BadRequest(f"dtype of {wrong[0]!r} is not a number")
    return found


def _ends(manifest: Manifest) -> Ints:
    """Position after the last row of each file; files must cover the rows without gap, else Damaged."""
    rows = np.array([entry.rows for entry in manifest.files], dtype=np.int64)
    ends = np.cumsum(rows, dtype=np.int64)
    starts = np.array([entry.start for entry in manifest.files], dtype=np.int64)
    if int(rows.sum()) != manifest.rows or not np.array_equal(starts, ends - rows):
        name = f"{manifest.dataset}@{manifest.version}"
        raise Damaged(f"the files of {name} do not cover its {manifest.rows} rows one after another")
    return ends
