"""All policies on a dataset for one principal as one value, and that value compiled for a schema."""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import BadRequest
from headrace.model import Policy, Principal
from headrace.policy.masks import Mask, pseudonyms
from headrace.policy.rules import concerns
from headrace.predicate import Predicate, compile_where
from headrace.predicate.words import tokenized


def key_id(key: bytes) -> str:
    """The name of a mask key, from which the key cannot be told."""
    return hmac.digest(key, b"headrace.mask-key", "sha256")[:8].hex()


@dataclass(frozen=True, slots=True)
class Effective:
    """What is hidden of ``dataset``: rows that fail a filter, columns (case-folded) behind masks. Both sorted."""

    dataset: str
    filters: tuple[str, ...]
    masks: tuple[tuple[str, Mask], ...]

    @property
    def body(self) -> str:
        """The normalised policy as JSON text."""
        masks = {name: mask.text for name, mask in self.masks}
        return json.dumps({"dataset": self.dataset, "filters": self.filters, "masks": masks})

    @classmethod
    def of(cls, body: str) -> Effective:
        """The policy that ``body`` was made of."""
        found = json.loads(body)
        masks = tuple((name, Mask.parse(text)) for name, text in found["masks"].items())
        return cls(found["dataset"], tuple(found["filters"]), masks)

    def compile(self, schema: pa.Schema, key: bytes) -> Compiled:
        """This policy for rows of ``schema`` (true types, system columns included), hashing with ``key``."""
        masks: dict[str, Mask] = {}
        for name, mask in self.masks:
            for column in schema.names:
                if column.casefold() == name:
                    masks[column] = masks[column] & mask if column in masks else mask
                elif name.startswith(f"{column.casefold()}.") and name not in map(str.casefold, schema.names):
                    # A field within a column: the whole column goes, as it cannot be shown in part.
                    masks[column] = Mask("null")
        fields = [
            pa.field(one.name, masks[one.name].type_of(one.type)) if one.name in masks else one
            for one in schema
            if one.name != "_raw"
        ]
        text = json.dumps([self.body, key_id(key), schema.serialize().to_pybytes().hex()])
        return Compiled(
            hmac.digest(key, b"policy\0" + text.encode(), "sha256")[:16].hex(),
            schema,
            pa.schema(fields),
            self,
            _predicates(self.filters, schema),
            masks,
            key,
        )


def _predicates(filters: Iterable[str], schema: pa.Schema) -> tuple[Predicate, ...] | None:
    try:
        return tuple(compile_where(text, schema) for text in filters)
    except BadRequest:
        return None


@dataclass(frozen=True, slots=True)
class Compiled:
    """A policy for rows of ``source``; they come out as ``schema``. ``key`` names policy, mask key and source."""

    key: str
    source: pa.Schema
    schema: pa.Schema
    policy: Effective
    _filters: tuple[Predicate, ...] | None
    masks: Mapping[str, Mask]
    _shared: bytes = field(repr=False)

    @property
    def _secret(self) -> bytes:
        """The key of this dataset's pseudonyms: those of another tell nothing about them."""
        return hmac.digest(self._shared, b"dataset\0" + self.policy.dataset.encode(), "sha256")

    @property
    def filtered(self) -> bool:
        """Whether rows are hidden, not only columns."""
        return self._filters is None or bool(self._filters)

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The visible rows of ``batch`` (of ``source``) with masked columns. Filters see what masks then hide."""
        kept = self._kept(batch)
        columns = [self._shown(name, kept.column(name)) for name in self.schema.names]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _kept(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if self._filters is None:
            return batch.slice(0, 0)
        for one in self._filters:
            batch = _passing(one, batch)
        return batch

    def _shown(self, name: str, column: pa.Array) -> pa.Array:
        if name in self.masks:
            mask = self.masks[name]
            named = mask.kind == "hash" and mask.argument
            key = hmac.digest(self._shared, b"shared\0" + named.encode(), "sha256") if named else self._secret
            return mask.apply(column, key)
        # An _id may be the value of a column, and a locator may hold one: behind masks both are pseudonyms.
        return self.veil(name, column) if self.policy.masks else column

    def veil(self, name: str, column: pa.Array) -> pa.Array:
        """A system column with what may hold a value behind pseudonyms, the same in every version."""
        if name == "_id":
            return pseudonyms(column, self._secret, b"_id")
        if name == "_source":
            return _with_field(column, "locator", b"locator", self._secret)
        if name == "_sources":
            parts = _with_field(column.flatten(), "id", b"_id", self._secret)
            lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
            missing = column.is_null() if column.null_count else None
            return pa.ListArray.from_arrays(offsets, parts, type=column.type, mask=missing)
        return column


def _passing(one: Predicate, batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows that pass a filter. One that cannot be computed is hidden without a word, and takes no other along."""
    try:
        return one.apply(batch)
    except BadRequest:
        if batch.num_rows <= 1:
            return batch.slice(0, 0)
    half = batch.num_rows // 2
    parts = [_passing(one, batch.slice(0, half)), _passing(one, batch.slice(half))]
    found = pa.Table.from_batches(parts, batch.schema).combine_chunks().to_batches()
    return found[0] if found else batch.slice(0, 0)


def _with_field(column: pa.Array, name: str, domain: bytes, key: bytes) -> pa.Array:
    parts = dict(zip([one.name for one in column.type], column.flatten(), strict=True))
    if name in parts:
        parts[name] = pseudonyms(parts[name], key, domain)
    missing = column.is_null() if column.null_count else None
    return pa.StructArray.from_arrays(list(parts.values()), fields=list(column.type), mask=missing)


def effective(
    policies: Iterable[Policy], principal: Principal, dataset: str, tags: Mapping[str, Iterable[str]]
) -> Effective | None:
    """The policies that hold for ``principal`` on ``dataset`` as one; None if there are none: all is visible.

    ``tags`` gives the tags of each column; a mask on ``tag:PATTERN`` is one on every column with such a tag.
    """
    mine = [policy for policy in policies if concerns(policy, principal, dataset)]
    if not mine:
        return None
    masks: dict[str, Mask] = {}
    for policy in mine:
        for name, text in policy.masks.items():
            for column in _columns(name, tags):
                mask = Mask.parse(text)
                masks[column] = masks[column] & mask if column in masks else mask
    filters = {_normal(policy.row_filter) for policy in mine if policy.row_filter is not None}
    return Effective(dataset, tuple(sorted(filters)), tuple(sorted(masks.items(), key=lambda item: item[0])))


def _columns(name: str, tags: Mapping[str, Iterable[str]]) -> list[str]:
    kind, colon, pattern = name.partition(":")
    if kind != "tag" or not colon:
        return [name.casefold()]
    return [column.casefold() for column, held in tags.items() if any(fnmatchcase(tag, pattern) for tag in held)]


def _normal(text: str) -> str:
    """A filter with single spaces between its words, so that layout alone makes no other policy."""
    return " ".join(text[token.start : token.end + 1] for token in tokenized(text))
