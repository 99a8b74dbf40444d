"""Frozen values that cross the wire or the layers. No logic beyond parsing and JSON; imports only errors and show."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from headrace.errors import BadData, BadRef, TooNew
from headrace.show import Shown

WIRE = 1
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
SYSTEM_COLUMNS = ("_id", "_source", "_ingested_at", "_raw", "_split", "_sources")

T = TypeVar("T")


def check_name(name: str, what: str = "dataset") -> str:
    """Return ``name`` if it is a valid dataset, tag, split or principal name; raise BadRef otherwise."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        shown = repr(name)[:80]
        raise BadRef(
            f"{shown} is not a valid {what} name",
            hint="use 1 to 128 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit",
        )
    return name


def check_tag(name: str) -> str:
    """Return ``name`` if it can name a version: a valid name with at least one letter, and not ``latest``."""
    check_name(name, "tag")
    if name == "latest" or not any(c.isalpha() for c in name):
        raise BadRef(f"{name!r} cannot be a tag", hint="a tag has at least one letter and is not 'latest'")
    return name


@dataclass(frozen=True, slots=True)
class Ref:
    """``name``, ``name@7``, ``name@latest``, ``name@tag``, each with an optional ``:split``."""

    dataset: str
    at: str = "latest"
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> Ref:
        """Parse a ref; raise BadRef with the form expected."""
        if not isinstance(text, str) or len(text) > 400:
            raise BadRef(
                "a ref is a short text such as 'patients@3'",
                hint="name, name@7, name@latest or name@tag, then ':split' if any",
            )
        head, colon, split = text.partition(":")
        name, sign, at = head.partition("@")
        check_name(name)
        if sign and not at.isdecimal():
            check_name(at, "version or tag")
        if colon:
            check_name(split, "split")
        return cls(name, at if sign else "latest", split if colon else None)

    def __str__(self) -> str:
        return f"{self.dataset}@{self.at}" + (f":{self.split}" if self.split else "")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. ``role`` is admin, producer or consumer; ``datasets`` are the name patterns the role holds for."""

    name: str
    role: str
    datasets: tuple[str, ...] = ("*",)


@dataclass(frozen=True, slots=True)
class Token:
    """An access token without its secret. ``secret`` is set once, in the answer to its creation."""

    id: str
    principal: str
    role: str
    datasets: tuple[str, ...]
    created_at: str
    expires_at: str | None = None
    revoked_at: str | None = None
    secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Policy:
    """What is hidden of the datasets whose names match ``dataset``, from ``subject``.

    ``subject`` is principal:NAME, role:NAME, group:NAME, or * for all but admins. ``row_filter`` is a SQL condition:
    rows for which it is not true are hidden. ``masks`` give a mask for a column or for ``tag:PATTERN``.
    """

    id: str
    dataset: str
    subject: str
    row_filter: str | None = None
    masks: Mapping[str, str] = field(default_factory=dict)
    created_at: str = ""


@dataclass(frozen=True, slots=True)
class ColumnTag:
    """A tag of a column, such as ``pii.email``; of a proposal also how many of the values looked at bear it out."""

    column: str
    tag: str
    values: int | None = None
    found: int | None = None


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one record of an upload was rejected; ``index`` counts from 0 within the upload."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Receipt(Shown):
    """The durable answer to an upload; ``duplicates`` counts records that an earlier upload of this key brought."""

    receipt: str
    dataset: str
    accepted: int
    rejected: int = 0
    duplicates: int = 0
    errors: tuple[RowError, ...] = ()
    state: str = "pending"
    version: int | None = None
    quarantined: int = 0


@dataclass(frozen=True, slots=True)
class Dataset(Shown):
    """A named table of records; ``version`` is its latest, or None before the first.

    ``rows`` and ``bytes`` are None while it is being found out what a policy shows of them.
    """

    name: str
    created_at: str
    version: int | None = None
    rows: int | None = 0
    bytes: int | None = 0
    pending: int = 0
    quarantined: int = 0
    tags: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepCount:
    """What one step did: rows_in = rows_out + quarantined + merged, but packing turns documents into rows."""

    step: str
    rows_in: int
    rows_out: int
    quarantined: int = 0
    merged: int = 0
    rules: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_dropped: int = 0


@dataclass(frozen=True, slots=True)
class Version(Shown):
    """One immutable version. ``schema`` lists name and Arrow type; ``block_rows`` is the feed's shuffle block."""

    dataset: str
    version: int
    created_at: str
    kind: str
    rows: int
    bytes: int
    files: int
    fingerprint: str
    schema: tuple[Mapping[str, str], ...]
    block_rows: int
    delta_version: int
    tags: tuple[str, ...] = ()
    splits: Mapping[str, int] = field(default_factory=dict)
    run: str | None = None
    recipe: str | None = None
    inputs: tuple[Mapping[str, Any], ...] = ()
    counts: tuple[StepCount, ...] = ()
    fitted: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""
    inbox_seq: int = 0

    @property
    def ref(self) -> str:
        """``name@version``."""
        return f"{self.dataset}@{self.version}"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One data file of a version; ``start`` is the position of its first row."""

    id: str
    rows: int
    bytes: int
    sha256: str
    start: int = 0
    path: str = ""
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The exact, immutable list of files behind one (ref, columns). ``arrow_schema``: base64 IPC of the true types."""

    dataset: str
    version: int
    fingerprint: str
    schema: tuple[Mapping[str, str], ...]
    arrow_schema: str
    rows: int
    block_rows: int
    files: tuple[FileEntry, ...]
    split: str | None = None
    next_page_token: str | None = None
    wire: int = WIRE

    def __post_init__(self) -> None:
        if self.wire > WIRE:
            raise TooNew(f"the exchange speaks wire version {self.wire}, this client {WIRE}", hint="upgrade headrace")


@dataclass(frozen=True, slots=True)
class Run(Shown):
    """One execution of a recipe. ``status`` is queued, running, succeeded, failed or cancelled.

    A failed one says why in ``error``, ``hint`` and ``error_code`` (a code of ``errors.py``).
    """

    id: str
    dataset: str
    status: str
    created_at: str
    recipe: str = ""
    started_at: str | None = None
    ended_at: str | None = None
    version: int | None = None
    attempts: int = 0
    rows_in: int = 0
    rows_out: int = 0
    quarantined: int = 0
    merged: int = 0
    steps: tuple[StepCount, ...] = ()
    progress: float = 0.0
    stage: str = ""
    error: str | None = None
    hint: str | None = None
    error_code: str | None = None
    preview_rows: int = 0


@dataclass(frozen=True, slots=True)
class Quarantined(Shown):
    """One dropped, refused or merged record: rule, value, and the record as JSON; ``kept`` is a merged one's twin."""

    id: str
    run: str
    step: str
    rule: str
    reason: str
    at: str
    record: str
    field: str | None = None
    value: str | None = None
    kept: str | None = None
    source: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Diff(Shown):
    """Records added, removed and changed between two versions, matched by ``_id``; the id lists are samples."""

    base: str
    other: str
    added: int
    removed: int
    changed: int
    same: int
    columns_added: tuple[str, ...] = ()
    columns_removed: tuple[str, ...] = ()
    sample_added: tuple[str, ...] = ()
    sample_removed: tuple[str, ...] = ()
    sample_changed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TracedRow:
    """One row of a training step: its position in the version, its ``_id``, and the source records behind it."""

    row: int
    id: str
    sources: tuple[Mapping[str, Any], ...]
    rank: int | None = None
    step: int | None = None


def to_dict(value: Any) -> Any:
    """A value of this module as plain JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    return value


def _build(kind: Any, value: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _build(next(a for a in args if a is not type(None)), value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_build(args[0], v) for v in value)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return from_dict(typing.cast(type, kind), value)
    return value


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """Build a value from plain JSON types; fields this side does not know are ignored, missing ones raise BadData."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(typing.cast(Any, cls))}
    try:
        return cls(**{k: _build(hints[k], v) for k, v in data.items() if k in known})
    except TypeError as error:
        raise BadData(
            f"not a {cls.__name__}: {error}", hint="is the other side of the same Headrace version?"
        ) from None
