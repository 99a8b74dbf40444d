"""PyTorch's side of the feed: a dataset that yields whole batches, and a loader that knows where it stands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from headrace.client.feed import DtypeLike, Feed, OpenProvider, Progress, open_provider
from headrace.errors import BadRequest, Conflict
from headrace.model import TracedRow
from headrace.order import Order, Shuffle

Batch: TypeAlias = dict[str, Any]
_SHUFFLES: tuple[Shuffle, ...] = (False, "window", "global")
_OURS = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "collate_fn")


def find_rank(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Rank and world size: as given, else of torch.distributed, else ``RANK`` and ``WORLD_SIZE``, else 0 of 1."""
    if (rank is None) != (world_size is None):
        raise BadRequest("rank and world_size are given together, or neither")
    if rank is not None and world_size is not None:
        return rank, world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise BadRequest(f"RANK and WORLD_SIZE are not numbers: {error}") from error


def _numpy_dtypes(dtype: Any) -> DtypeLike:
    if isinstance(dtype, Mapping):
        return {name: _numpy_dtypes(kind) for name, kind in dtype.items()}
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def _tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if isinstance(value, np.generic):
        return torch.from_numpy(np.array(value))
    if isinstance(value, dict):
        return {name: _tensors(part) for name, part in value.items()}
    if isinstance(value, list) and any(isinstance(part, np.ndarray) for part in value):
        return [_tensors(part) for part in value]
    return value


def _as_is(batch: Any) -> Any:
    return batch


class StreamingDataset(IterableDataset[Batch]):
    """A ref of an exchange as batches of this rank: dicts of tensors, ready for a model.

    ``source``: ``http://host:port/REF`` or ``ROOT/REF``. Integers come as int64, floats as float32 unless ``dtype``
    (a NumPy or torch type, or one per column) says otherwise; fixed-size lists are stacked, strings and bytes lists.
    ``batch_size`` counts per rank. ``shuffle``: True (``"window"``), ``"global"`` or False. ``drop_last=False`` fills
    the last global batch from the epoch's beginning, so that all ranks make the same number of steps. ``transform``
    maps each batch. ``prefetch`` is the number of files fetched ahead.

    Each new iteration is the next epoch unless ``set_epoch`` was called. In worker processes a dataset cannot tell how
    often it was iterated: with a plain ``DataLoader(batch_size=None, num_workers=…)`` call ``set_epoch`` before each.
    """

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
        rank: int | None = None,
        world_size: int | None = None,
        cache_dir: str | Path | None = None,
        cache_limit: str | int = "50GB",
        prefetch: int = 4,
        transform: Callable[[Batch], Any] | None = None,
        dtype: Any = None,
        opener: OpenProvider = open_provider,
    ) -> None:
        rank, world_size = find_rank(rank, world_size)
        self.feed = Feed(
            source,
            token,
            columns=columns,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            cache_dir=cache_dir,
            cache_limit=cache_limit,
            prefetch=prefetch,
            dtype=_numpy_dtypes(dtype),
            opener=opener,
        )
        self.transform = transform
        self.progress = Progress()
        # Shared with worker processes, so that persistent ones hear of epochs and loaded states.
        self._shared: torch.Tensor = torch.zeros(6, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._resumed: tuple[int, int, int] | None = None
        self._worker_at = (0, 0, 0)
        self.announce(0, 0)

    def __repr__(self) -> str:
        share = "" if self.feed.world_size == 1 else f", rank {self.feed.rank} of {self.feed.world_size}"
        return f"<StreamingDataset {self.feed.pinned}: {self.rows:,} rows, {len(self):,} batches an epoch{share}>"

    def announce(self, epoch: int, samples: int) -> None:
        """Tell worker processes where their next iteration starts, and in which order."""
        order = self.feed.order(0)
        seed = (order.seed & (2**64 - 1)) - (2**64 if order.seed & (1 << 63) else 0)
        words = [epoch, samples, seed, _SHUFFLES.index(order.shuffle), order.block_rows, order.window_blocks]
        self._shared.copy_(torch.tensor(words, dtype=torch.int64))

    @property
    def rows(self) -> int:
        """Rows of the ref, over all ranks."""
        return self.feed.rows

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        return self.feed.steps()

    def __getitem__(self, index: int) -> Batch:
        """Stored row ``index`` as a dict: no shuffle, no batch dimension, no transform."""
        row: Batch = _tensors(self.feed.row(index))
        return row

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        if info is not None:
            return self._worker_batches(info.id, info.num_workers)
        return self._batches()

    def _made(self, batch: Batch) -> Any:
        tensors = {
            name: torch.from_numpy(value) if type(value) is np.ndarray and value.flags.writeable else _tensors(value)
            for name, value in batch.items()
        }
        return tensors if self.transform is None else self.transform(tensors)

    def _batches(self) -> Iterator[Any]:
        progress, feed = self.progress, self.feed
        epoch, samples = progress.begin()
        self.announce(epoch, samples)
        loads, together = progress.loads, feed.batch_size * feed.world_size
        for batch in feed.batches(epoch, samples):
            made = self._made(batch)
            samples += together
            self.delivered(epoch, samples, loads)
            yield made

    def delivered(self, epoch: int, samples: int, loads: int) -> None:
        """Note that a batch goes out; an iteration that began before a state was loaded may not go on: Conflict."""
        if loads != self.progress.loads:
            raise Conflict("a state was loaded while this iteration ran", hint="iterate anew to go on from the state")
        if epoch == self.progress.epoch:
            self.progress.samples = samples

    def _worker_batches(self, worker: int, workers: int) -> Iterator[Any]:
        epoch, first, seed, shuffle, block_rows, window_blocks = self._shared.tolist()
        done = 0
        if self._resumed is None:
            self.feed.reorder(Order(self.rows, seed, 0, _SHUFFLES[shuffle], block_rows, window_blocks))
        else:
            (epoch, first, done), self._resumed = self._resumed, None
        self._worker_at = epoch, first, done
        for batch in self.feed.batches(epoch, first, worker + done * workers, workers):
            made = self._made(batch)
            self._worker_at = epoch, first, self._worker_at[2] + 1
            yield made

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch; a state of this epoch that was just loaded keeps its place."""
        self.progress.set_epoch(epoch)
        self.announce(self.progress.epoch, self.progress.samples)

    def state_dict(self) -> dict[str, Any]:
        """Where the feed stands, as small JSON, the same on every rank.

        In a worker process it also counts the worker's own steps (for loaders that keep the states of their workers).
        """
        if get_worker_info() is not None:
            epoch, first, done = self._worker_at
            return {**self.feed.state(0, 0), "epoch": epoch, "samples": first, "own_steps": done}
        return self.feed.state(self.progress.epoch, self.progress.samples)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, at any world size. Conflict if it belongs to other data."""
        epoch, samples = self.feed.load(state)
        if get_worker_info() is not None:
            self._resumed = epoch, samples, int(state.get("own_steps", 0))
            return
        self.progress.load(epoch, samples)
        self.announce(epoch, samples)

    def sources(self, step: int) -> list[TracedRow]:
        """The rows of one step of this epoch, over all ranks, with the source records behind them."""
        return self.feed.trace(self.progress.epoch, step)


class StreamingDataLoader(DataLoader[Batch]):
    """A DataLoader over a StreamingDataset whose state counts the batches delivered, whatever workers made ahead.

    Takes DataLoader's options except those that the dataset settles (batch_size, shuffle, …). ``num_workers=0`` is
    usually fastest: making a batch costs about as much as handing it over from another process.
    """

    def __init__(self, dataset: StreamingDataset, **options: Any) -> None:
        if not isinstance(dataset, StreamingDataset):
            raise BadRequest(f"StreamingDataLoader takes a StreamingDataset, not {type(dataset).__name__}")
        for name in _OURS:
            if options.pop(name, None) is not None:
                raise BadRequest(f"{name} is not an option of StreamingDataLoader", hint="give it to StreamingDataset")
        super().__init__(dataset, batch_size=None, collate_fn=_as_is, **options)
        self.stream = dataset

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        return len(self.stream)

    def __iter__(self) -> Any:
        if self.num_workers == 0 and not self.pin_memory:
            return iter(self.stream)
        return self._through_workers()

    def _through_workers(self) -> Iterator[Any]:
        stream, feed = self.stream, self.stream.feed
        if self.num_workers == 0:
            yield from super().__iter__()
            return
        epoch, samples = stream.progress.begin()
        stream.announce(epoch, samples)
        loads, together = stream.progress.loads, feed.batch_size * feed.world_size
        for batch in super().__iter__():
            samples += together
            stream.delivered(epoch, samples, loads)
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """As the dataset's."""
        self.stream.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: batches delivered, not made ahead. Small JSON, the same on every rank."""
        return self.stream.feed.state(self.stream.progress.epoch, self.stream.progress.samples)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, at any world size and number of workers. Conflict if it belongs to other data."""
        self.stream.load_state_dict(state)
