"""Texts into tokens, by a named tokenizer, by bytes, or by one trained on the texts themselves."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace import settings
from headrace.errors import BadRecipe, Damaged
from headrace.steps import FitStep, Outcome, Position, Step, column, drop, fired
from headrace.transform.pack import Pack

BYTES = "bytes"
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]")


def _tokenizers() -> Any:
    # The library's own threads would outnumber ours, and it warns about them after a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers  # noqa: PLC0415

    return tokenizers


@dataclass(frozen=True)
class Train:
    """Train a byte-level BPE of ``vocab_size`` entries on about ``sample_bytes`` of text spread over the whole."""

    train: Literal["bpe"]
    vocab_size: int = 8192
    sample_bytes: int = 50_000_000

    def __post_init__(self) -> None:
        if not 257 <= self.vocab_size <= 10_000_000:
            raise BadRecipe(
                f"tokenize: vocab_size {self.vocab_size} is not within 257 and 10,000,000", hint="default: 8192"
            )
        if self.sample_bytes < 1:
            raise BadRecipe("tokenize: sample_bytes is not above 0", hint="default: 50000000")


@dataclass(frozen=True)
class Tokenize(Step):
    """Replace the text in ``column`` by its tokens; with ``pack``, cut the documents into rows of exactly that many.

    ``tokenizer`` is the name of a folder or file below the tokenizers folder, a path to a tokenizer.json, ``bytes``
    (ids 0 to 255 are UTF-8 bytes, 256 ends a document), or a mapping that trains one. ``eos`` ends each document
    with the tokenizer's end token, or with the one named. Packing drops the tokens left over at the end of a split.
    """

    name: ClassVar[str] = "tokenize"

    tokenizer: str | Train
    column: str = "text"
    eos: bool | str = True
    pack: int | None = None
    remainder: Literal["drop"] = "drop"
    into: str = field(default="tokens", metadata={"key": "name"})

    def __post_init__(self) -> None:
        if self.pack is not None and not 2 <= self.pack <= 1 << 24:
            raise BadRecipe(f"tokenize: pack {self.pack} is not within 2 and {1 << 24}", hint="2048 is usual")
        if not self.into or self.into.startswith("_"):
            raise BadRecipe(f"tokenize: the tokens cannot be named {self.into!r}", hint="choose another name")

    def expand(self, base: Path | None) -> list[Step]:
        """The tokenising step, then the packing one if ``pack`` is set. Paths count from ``base``."""
        first: Step
        if isinstance(self.tokenizer, Train):
            first = TrainedTokens(self.column, self.eos, self.into, self.tokenizer)
        else:
            where = self.tokenizer
            if _is_path(where):
                where = str((base or Path()) / Path(where).expanduser())
            first = Tokens(self.column, self.eos, self.into, where)
        return [first] if self.pack is None else [first, Pack(self.pack, self.into)]

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:
        """Tokenise without packing."""
        return self.expand(None)[0].apply(batch, state, at)


@lru_cache(maxsize=4)
def _load(path: str, sha256: str | None, _modified: int) -> Any:
    text = Path(path).read_bytes()
    if sha256 is not None and hashlib.sha256(text).hexdigest() != sha256:
        raise Damaged(f"{path} is not the tokenizer that was trained", hint="run the recipe again")
    try:
        return _tokenizers().Tokenizer.from_buffer(text)
    except ValueError as error:
        raise BadRecipe(f"step 'tokenize': {path} is not a tokenizer: {error}", hint="give a tokenizer.json") from None


def _is_path(name: str) -> bool:
    return name.endswith(".json") or "/" in name or name in (".", "..")


def _find(name: str, state: Mapping[str, Any]) -> Path:
    """The tokenizer.json behind a name or path; raises BadRecipe that says where it belongs."""
    if _is_path(name):
        path = Path(name)
        places = [path / "tokenizer.json", path] if path.is_dir() else [path]
    else:
        folder = Path(str(state.get("tokenizers") or settings.text("tokenizers") or "tokenizers"))
        places = [folder / name / "tokenizer.json", folder / f"{name}.json"]
    for place in places:
        if place.is_file():
            return place
    raise BadRecipe(f"step 'tokenize': there is no tokenizer {name!r}", hint=f"put its tokenizer.json at {places[0]}")


def _end_token(tokenizer: Any, eos: bool | str) -> int | None:
    if eos is False:
        return None
    names = END_NAMES if eos is True else (eos,)
    for name in names:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return int(token)
    hint = f"none of {', '.join(names)} is in its vocabulary; name its end token in eos:, or set eos: false"
    raise BadRecipe("step 'tokenize': the tokenizer has no such end token", hint=hint)


def _with_end(
    flat: npt.NDArray[Any], lengths: npt.NDArray[np.int64], end: int | None, kind: npt.DTypeLike
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Add ``end`` after every document of a flat run of tokens."""
    if end is None:
        return flat.astype(kind, copy=False), lengths
    out = np.full(len(flat) + len(lengths), end, dtype=kind)
    text = np.ones(len(out), dtype=bool)
    text[np.cumsum(lengths + 1) - 1] = False
    out[text] = flat
    return out, lengths + 1


@dataclass(frozen=True)
class _TokenStep(Step):
    """What both tokenising steps share."""

    name: ClassVar[str] = "tokenize"

    column: str
    eos: bool | str
    into: str

    def _texts(self, batch: pa.RecordBatch) -> pa.Array:
        texts = column(batch, self.column, self.name)
        if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
            raise BadRecipe(f"step 'tokenize': {self.column!r} is {texts.type}, not text", hint="name a text column")
        if self.into != self.column and self.into in batch.schema.names:
            raise BadRecipe(
                f"step 'tokenize': there is a column {self.into!r} already", hint="give name:, or rename it"
            )
        return texts

    def _good(self, batch: pa.RecordBatch) -> Outcome:
        texts = self._texts(batch)
        nulls = np.flatnonzero(texts.is_null().to_numpy(zero_copy_only=False))
        empty = np.flatnonzero(pc.equal(pc.binary_length(texts), 0).fill_null(False).to_numpy(zero_copy_only=False))
        return drop(
            batch,
            [
                fired(nulls, "tokenize.null", [f"{self.column} is null"] * len(nulls), field=self.column),
                fired(empty, "tokenize.empty", [f"{self.column} is empty"] * len(empty), field=self.column),
            ],
        )

    def _replace(self, batch: pa.RecordBatch, flat: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> pa.RecordBatch:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
        at = batch.schema.get_field_index(self.column)
        return batch.set_column(at, pa.field(self.into, tokens.type), tokens)

    def _bytes(self, outcome: Outcome) -> Outcome:
        texts = outcome.batch.column(self.column).cast(pa.large_string())
        lengths = pc.binary_length(texts).to_numpy(zero_copy_only=False).astype(np.int64)
        first = np.frombuffer(texts.buffers()[1], dtype=np.int64)[texts.offset] if len(texts) else 0
        data = texts.buffers()[2]
        flat = np.frombuffer(data if data is not None else b"", dtype=np.uint8)[first : first + lengths.sum()]
        end = None if self.eos is False else 256
        return Outcome(self._replace(outcome.batch, *_with_end(flat, lengths, end, np.uint16)), outcome.verdicts)

    def _encode(self, outcome: Outcome, tokenizer: Any) -> Outcome:
        texts = outcome.batch.column(self.column).to_pylist()
        kind = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
        encoded = [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        flat = np.concatenate([np.array([], dtype=kind), *(np.array(ids, dtype=kind) for ids in encoded)])
        end = _end_token(tokenizer, self.eos)
        return Outcome(self._replace(outcome.batch, *_with_end(flat, lengths, end, kind)), outcome.verdicts)


@dataclass(frozen=True)
class Tokens(_TokenStep):
    """Tokenise with a tokenizer that exists. ``state["tokenizers"]`` may name the folder of the named ones."""

    tokenizer: str

    def paths(self) -> tuple[str, ...]:
        """The tokenizer, unless it is one of the named ones, which anyone may use."""
        return (self.tokenizer,) if _is_path(self.tokenizer) else ()

    def check(self, state: Mapping[str, Any]) -> None:
        """The tokenizer must be there."""
        if self.tokenizer != BYTES:
            _find(self.tokenizer, state)

    def used(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The tokenizer: its file, sha256 and size; bytes need none."""
        if self.tokenizer == BYTES:
            return {"tokenizer": BYTES}
        path = _find(self.tokenizer, state)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        size = _load(str(path), digest, path.stat().st_mtime_ns).get_vocab_size()
        return {"path": str(path), "sha256": digest, "vocab_size": size}

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:  # noqa: ARG002
        """list<uint16> tokens in the text's place (uint32 beyond 65,536 entries); null and empty texts are dropped."""
        outcome = self._good(batch)
        if self.tokenizer == BYTES:
            if isinstance(self.eos, str):
                raise BadRecipe("step 'tokenize': bytes have no named tokens", hint="set eos to true or false")
            return self._bytes(outcome)
        path = _find(self.tokenizer, state)
        return self._encode(outcome, _load(str(path), None, path.stat().st_mtime_ns))


@dataclass(frozen=True)
class TrainedTokens(_TokenStep, FitStep):
    """Tokenise with a byte-level BPE trained on a sample of the very texts; its end token is ``<|endoftext|>``."""

    train: Train

    def keys(self, batch: pa.RecordBatch) -> pa.RecordBatch | None:
        """``text``: a part of the batch's texts, spread evenly, of about a sixteenth of ``sample_bytes`` at most."""
        texts = self._texts(batch).drop_null()
        size, limit = texts.nbytes, max(1 << 16, self.train.sample_bytes // 16)
        stride = max(1, -(-size // limit))
        picked = texts.take(pa.array(np.arange(0, len(texts), stride)))
        return pa.record_batch({"text": picked}) if len(picked) else None

    def _sample(self, keys: Sequence[Path]) -> Iterator[list[str]]:
        """Batches of texts, an even share of ``sample_bytes`` from each file; what one leaves the next may use."""
        spare = self.train.sample_bytes
        for index, path in enumerate(keys):
            share = spare // (len(keys) - index)
            for batch in pq.ParquetFile(path).iter_batches(batch_size=1024, columns=["text"]):
                texts = batch.column(0)
                ends = np.cumsum(pc.binary_length(texts).to_numpy(zero_copy_only=False))
                count = min(len(texts), int(np.searchsorted(ends, share)) + 1)
                yield texts.slice(0, count).to_pylist()
                share -= int(ends[count - 1])
                spare -= int(ends[count - 1])
                if share <= 0:
                    break

    def used(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The trained tokenizer: its file, sha256 and size."""
        return {key: state[key] for key in ("path", "sha256", "vocab_size")}

    def fit(self, keys: Sequence[Path], out: Path) -> dict[str, Any]:
        """Train, and write ``out``/tokenizer.json: ``path``, ``sha256`` and ``vocab_size``."""
        library = _tokenizers()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=self.train.vocab_size,
            special_tokens=[self.eos if isinstance(self.eos, str) else END_NAMES[0]],
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(self._sample(keys), trainer)
        text = tokenizer.to_str().encode()
        out.mkdir(parents=True, exist_ok=True)
        path = out / "tokenizer.json"
        path.write_bytes(text)
        digest = hashlib.sha256(text).hexdigest()
        return {"path": str(path), "sha256": digest, "vocab_size": tokenizer.get_vocab_size()}

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:  # noqa: ARG002
        """As ``Tokens.apply``, with the trained tokenizer; another file at its path raises Damaged."""
        path = Path(state["path"])
        if not path.is_file():
            raise Damaged(f"the trained tokenizer {path} is missing", hint="run the recipe again")
        return self._encode(self._good(batch), _load(str(path), state["sha256"], path.stat().st_mtime_ns))
