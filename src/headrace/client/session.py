"""What ``headrace.connect`` returns: one set of methods, the same for a remote and an embedded exchange."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import time
import types
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa

from headrace import errors, show
from headrace.client.payload import Content, payload, watched
from headrace.client.policies import PolicyMethods
from headrace.errors import BadRecipe, BadRef, BadRequest, Conflict, NotFound
from headrace.model import (
    Dataset,
    Diff,
    Quarantined,
    Receipt,
    Ref,
    Run,
    Token,
    TracedRow,
    Version,
    check_name,
    check_tag,
)

PAGE = 1000
POLL_FIRST_S, POLL_MAX_S = 0.05, 1.0
HEAD_ROWS = 10
ENDED = ("succeeded", "failed", "cancelled")

UploadProgress = Callable[[int, int | None], None]
RunProgress = Callable[[Run], None]


def _ref(ref: Ref | str) -> Ref:
    return ref if isinstance(ref, Ref) else Ref.parse(ref)


def recipe_text(recipe: str | Path) -> tuple[str, str]:
    """The YAML text of a recipe and the folder that its relative paths start from.

    Text with a line break or a colon-space is the recipe itself; anything else names a file (NotFound if missing).
    """
    if isinstance(recipe, str) and ("\n" in recipe or ": " in recipe):
        return recipe, str(Path.cwd())
    path = Path(recipe)
    if not path.is_file():
        raise NotFound(f"there is no recipe file {str(recipe)!r}", hint="`headrace init` writes one to start from")
    try:
        return path.read_text(encoding="utf-8"), str(path.resolve().parent)
    except UnicodeDecodeError:
        raise BadRecipe(f"{str(recipe)!r} is not UTF-8 text", hint="a recipe is a YAML file") from None


@contextlib.contextmanager
def _naming(recipe: str | Path) -> Iterator[None]:
    """Problems of a recipe that came from a file name that file: the exchange has seen its text alone."""
    try:
        yield
    except BadRecipe as error:
        problems, text = error.details.get("problems"), str(recipe)
        if not problems or "\n" in text or ": " in text:
            raise
        first = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        message = f"{text}, line {first['line']}: {first['message']}{more}"
        raise BadRecipe(message, hint=error.hint, details={**error.details, "file": text}) from None


class Session(PolicyMethods):
    """An open exchange. Methods raise errors of ``headrace.errors``; use it as a context manager or call ``close``."""

    # One primitive per REST route; values are those of model.py.

    @abc.abstractmethod
    def _upload(
        self,
        dataset: str,
        body: Content,
        content_type: str,
        encoding: str | None,
        key: str | None,
        idempotency_key: str | None,
    ) -> Receipt:
        """Store a body durably. ``encoding`` is gzip, zstd or None; ``key`` names the column that becomes ``_id``."""

    @abc.abstractmethod
    def _get_data(self, limit: int | None, offset: int) -> Iterator[bytes]:
        """The JSON array text of dataset ``default``, in chunks."""

    @abc.abstractmethod
    def _dataset(self, name: str) -> Dataset:
        """One dataset; NotFound."""

    @abc.abstractmethod
    def _versions(self, name: str, limit: int, page_token: str | None) -> tuple[list[Version], str | None]:
        """One page of versions and the token of the next."""

    @abc.abstractmethod
    def _version(self, ref: Ref) -> Version:
        """The version that a ref names; NotFound."""

    @abc.abstractmethod
    def _tag(self, ref: Ref, name: str) -> Version:
        """Make a tag name this version."""

    @abc.abstractmethod
    def _diff(self, base: Ref, other: Ref) -> Diff:
        """Compare two versions by ``_id``."""

    @abc.abstractmethod
    def _quarantine(
        self, name: str, rule: str | None, limit: int, page_token: str | None
    ) -> tuple[list[Quarantined], str | None]:
        """One page of quarantined records and the token of the next."""

    @abc.abstractmethod
    def _read(
        self, ref: Ref, columns: Sequence[str] | None, where: str | None, limit: int | None
    ) -> pa.RecordBatchReader:
        """The rows behind a ref, streamed; user columns if ``columns`` is None."""

    @abc.abstractmethod
    def _trace(
        self,
        ref: Ref,
        *,
        step: int | None,
        seed: int,
        epoch: int,
        batch_size: int,
        world_size: int,
        shuffle: str,
        row: str | None,
        source: str | None,
    ) -> list[TracedRow]:
        """The rows of one training step, of one ``_id``, or of one source locator."""

    @abc.abstractmethod
    def _check_recipe(self, text: str, base: str) -> list[dict[str, Any]]:
        """The problems of a recipe; none if it can run."""

    @abc.abstractmethod
    def _start_run(self, text: str, base: str) -> Run:
        """Queue a run."""

    @abc.abstractmethod
    def _preview(self, text: str, base: str, rows: int) -> dict[str, Any]:
        """What a recipe does to a sample; commits nothing."""

    @abc.abstractmethod
    def _create_token(self, name: str, role: str, datasets: Sequence[str], days: int | None) -> Token:
        """Make a token; the answer alone holds its secret."""

    @abc.abstractmethod
    def _tokenizer(self, ref: Ref) -> bytes:
        """The tokenizer.json of a version."""

    @abc.abstractmethod
    def datasets(self) -> list[Dataset]:
        """All datasets that this caller may see."""

    @abc.abstractmethod
    def receipt(self, id: str) -> Receipt:
        """What became of an upload; NotFound once it is older than ``receipts_keep_days``."""

    @abc.abstractmethod
    def runs(self) -> list[Run]:
        """Runs, the newest first."""

    @abc.abstractmethod
    def run_status(self, id: str) -> Run:
        """One run as it stands; NotFound."""

    @abc.abstractmethod
    def tokens(self) -> list[Token]:
        """All tokens, without their secrets."""

    @abc.abstractmethod
    def revoke_token(self, id: str) -> None:
        """End a token at once; NotFound."""

    @abc.abstractmethod
    def health(self) -> dict[str, Any]:
        """Whether the exchange can take and give data."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give connections, threads and locks back. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    # Data in.

    def upload(
        self,
        dataset: str,
        records: Any,
        *,
        key: str | None = None,
        idempotency_key: str | None = None,
        format: str | None = None,
        on_progress: UploadProgress | None = None,
    ) -> Receipt:
        """Store records durably; when this returns they are safe and readable at ``dataset@latest``.

        ``records``: a dict, a list or iterator of dicts, an Arrow table, batch or reader, a pandas or polars frame, a
        path (format by suffix: json, jsonl, csv, tsv, parquet, arrow; .gz, .zst) or a binary file with ``format``.
        ``key`` names a column that becomes ``_id``. A repeated ``idempotency_key`` stores nothing twice; without one a
        random key is used, so that an automatic retry after a lost answer cannot duplicate either.
        ``on_progress`` hears (bytes sent, bytes in all or None). Raises BadData for a body that cannot be parsed.
        """
        check_name(dataset)
        body = payload(records, format)
        content = watched(body.content, on_progress) if on_progress else body.content
        once = idempotency_key or uuid.uuid4().hex
        return self._upload(dataset, content, body.content_type, body.encoding, key, once)

    # Recipes and runs.

    def check_recipe(self, recipe: str | Path) -> list[dict[str, Any]]:
        """The problems of a recipe (file or YAML text), each with line, what is wrong and what to write instead."""
        return self._check_recipe(*recipe_text(recipe))

    def preview(self, recipe: str | Path, rows: int = 1000) -> dict[str, Any]:
        """What a recipe does to the first ``rows`` records: counts per step, samples, drops. Commits nothing."""
        with _naming(recipe):
            return self._preview(*recipe_text(recipe), rows)

    def run(self, recipe: str | Path, wait: bool = True, on_progress: RunProgress | None = None) -> Run:
        """Run a recipe (file or YAML text). With ``wait`` returns when it has succeeded, else at once, queued.

        ``on_progress`` hears the run as it changes. Raises BadRecipe before anything runs, RunFailed or
        ExpectationFailed (``details["run"]`` is the run's id) when it ends without a version.
        """
        with _naming(recipe):
            run = self._start_run(*recipe_text(recipe))
        return self.wait(run.id, on_progress) if wait else run

    def wait(self, id: str, on_progress: RunProgress | None = None) -> Run:
        """Wait until a run has ended; raises what it failed with."""
        pause, last = POLL_FIRST_S, None
        while True:
            run = self.run_status(id)
            if on_progress and run != last:
                on_progress(run)
            if run.status in ENDED:
                return _succeeded(run)
            # A run that moves is asked often; one that stands still is left in peace.
            pause = POLL_FIRST_S if run != last else min(pause * 1.5, POLL_MAX_S)
            last = run
            time.sleep(pause)

    # Data out.

    def dataset(self, ref: Ref | str) -> DatasetView:
        """A dataset at a version, with its rows and what can be done with them; NotFound."""
        return DatasetView(self, _ref(ref))

    def versions(self, name: str) -> list[Version]:
        """All versions of a dataset, the newest first."""
        check_name(name)
        found, token = self._versions(name, PAGE, None)
        while token:
            more, token = self._versions(name, PAGE, token)
            found = found + more
        return found

    def show(self, ref: Ref | str) -> Version:
        """Everything known of a version: schema, counts, inputs, fingerprint."""
        return self._version(_ref(ref))

    def diff(self, base: Ref | str, other: Ref | str) -> Diff:
        """Records added, removed and changed from ``base`` to ``other``, two versions of one dataset."""
        base, other = _ref(base), _ref(other)
        if base.dataset != other.dataset:
            raise BadRef(f"{base} and {other} are of two datasets", hint="compare two versions of one dataset")
        return self._diff(base, other)

    def tag(self, ref: Ref | str, name: str) -> Version:
        """Make the tag ``name`` stand for a version; a tag that stood elsewhere moves."""
        return self._tag(_ref(ref), check_tag(name))

    def read(
        self,
        ref: Ref | str,
        columns: Sequence[str] | None = None,
        where: str | None = None,
        limit: int | None = None,
    ) -> pa.RecordBatchReader:
        """The rows behind a ref as a stream of Arrow batches. ``where`` is a SQL condition over columns."""
        if limit is not None and limit < 0:
            raise BadRequest(f"limit={limit} is below 0", hint="leave it out for all rows")
        return self._read(_ref(ref), None if columns is None else list(columns), where, limit)

    def tokenizer(self, ref: Ref | str) -> str:
        """The tokenizer.json that made a version's tokens: ``tokenizers.Tokenizer.from_str`` reads it. NotFound."""
        return self._tokenizer(_ref(ref)).decode()

    def head(self, ref: Ref | str, n: int = HEAD_ROWS) -> list[dict[str, Any]]:
        """The first ``n`` rows as dicts."""
        rows: list[dict[str, Any]] = self.read(ref, limit=n).read_all().to_pylist()
        return rows

    def get_data(self, limit: int | None = None, offset: int = 0) -> list[Any]:
        """The records of dataset ``default`` exactly as uploaded, in order of arrival."""
        records: list[Any] = json.loads(b"".join(self._get_data(limit, offset)))
        return records

    def quarantine(self, name: str, rule: str | None = None, limit: int = 100) -> list[Quarantined]:
        """Up to ``limit`` dropped or refused records of a dataset, each with rule, value and reason."""
        check_name(name)
        found, token = self._quarantine(name, rule, min(limit, PAGE), None)
        while token and len(found) < limit:
            more, token = self._quarantine(name, rule, min(limit - len(found), PAGE), token)
            found = found + more
        return found[:limit]

    def trace(
        self,
        ref: Ref | str,
        *,
        step: int | None = None,
        seed: int = 0,
        epoch: int = 0,
        batch_size: int = 32,
        world_size: int = 1,
        shuffle: str | bool = "window",
        row: str | None = None,
        source: str | None = None,
    ) -> list[TracedRow]:
        """The rows behind a training step (0-based, all ranks), an ``_id`` (``row``) or a ``source`` locator.

        ``batch_size`` is per rank; ``shuffle`` is "window" (or True), "global" or False.
        """
        if sum(asked is not None for asked in (step, row, source)) != 1:
            raise BadRequest("say exactly one of step, row and source", hint="for example step=1200, or row='…'")
        order = {True: "window", False: "false"}[shuffle] if isinstance(shuffle, bool) else shuffle
        return self._trace(
            _ref(ref),
            step=step,
            seed=seed,
            epoch=epoch,
            batch_size=batch_size,
            world_size=world_size,
            shuffle=order,
            row=row,
            source=source,
        )

    # Access.

    def create_token(
        self,
        name: str,
        role: Literal["admin", "producer", "consumer"] | str = "consumer",
        datasets: Sequence[str] = ("*",),
        days: int | None = None,
    ) -> Token:
        """Make a token for ``name``; its ``secret`` is in this answer only. ``datasets`` are name patterns."""
        return self._create_token(check_name(name, "principal"), role, tuple(datasets), days)


def _succeeded(run: Run) -> Run:
    if run.status == "succeeded":
        return run
    if run.status == "cancelled":
        raise Conflict(f"run {run.id} was cancelled", details={"run": run.id})
    said = {
        "code": run.error_code or errors.RunFailed.code,
        "message": run.error or f"run {run.id} failed",
        "hint": run.hint or f"`headrace runs {run.id}` shows what each step did",
        "details": {"run": run.id},
    }
    raise errors.from_dict({"error": said}, errors.RunFailed.status)


class DatasetView:
    """A dataset at a ref. ``version`` is fixed when the view is made; reads of ``latest`` see what arrived since."""

    def __init__(self, session: Session, ref: Ref) -> None:
        """Look the ref up; NotFound if there is no such dataset or version."""
        self._session = session
        self._ref = ref
        self.info: Dataset = session._dataset(ref.dataset)
        newborn = ref.at == "latest" and self.info.version is None
        self._version: Version | None = None if newborn else session._version(ref)

    @property
    def ref(self) -> str:
        """The ref this view was made with, in full."""
        return str(self._ref)

    @property
    def version(self) -> int | None:
        """The version's number; None while all records are still on their way into the first."""
        return self._version.version if self._version else None

    @property
    def details(self) -> Version | None:
        """Everything known of the version."""
        return self._version

    @property
    def schema(self) -> pa.Schema:
        """Names and Arrow types of the user columns."""
        with self._session.read(self._ref, limit=1) as reader:
            return reader.schema

    @property
    def rows(self) -> int:
        """Rows of the version (of the split if the ref names one)."""
        if self._version is None:
            return self.info.pending
        split = self._ref.split
        return self._version.splits.get(split, 0) if split else self._version.rows

    @property
    def fingerprint(self) -> str | None:
        """The content hash of the version: equal for equal content."""
        return self._version.fingerprint if self._version else None

    def __len__(self) -> int:
        return self.rows

    def to_reader(
        self, columns: Sequence[str] | None = None, where: str | None = None, limit: int | None = None
    ) -> pa.RecordBatchReader:
        """The rows as a stream of Arrow batches."""
        return self._session.read(self._ref, columns, where, limit)

    def to_arrow(
        self, columns: Sequence[str] | None = None, where: str | None = None, limit: int | None = None
    ) -> pa.Table:
        """The rows as one Arrow table in memory."""
        return self.to_reader(columns, where, limit).read_all()

    def to_pandas(
        self, columns: Sequence[str] | None = None, where: str | None = None, limit: int | None = None
    ) -> Any:
        """The rows as a pandas DataFrame; needs pandas."""
        return self.to_arrow(columns, where, limit).to_pandas()

    def to_polars(
        self, columns: Sequence[str] | None = None, where: str | None = None, limit: int | None = None
    ) -> Any:
        """The rows as a polars DataFrame; needs polars."""
        return _polars().from_arrow(self.to_arrow(columns, where, limit))

    def head(self, n: int = HEAD_ROWS) -> list[dict[str, Any]]:
        """The first ``n`` rows as dicts."""
        return self._session.head(self._ref, n)

    def versions(self) -> list[Version]:
        """All versions of this dataset, the newest first."""
        return self._session.versions(self._ref.dataset)

    def diff(self, other: DatasetView | Ref | str) -> Diff:
        """Records added, removed and changed from this version to ``other``."""
        return self._session.diff(self._fixed(), other._fixed() if isinstance(other, DatasetView) else other)

    def tag(self, name: str) -> Version:
        """Make the tag ``name`` stand for this version."""
        return self._session.tag(self._fixed(), name)

    def quarantine(self, rule: str | None = None, limit: int = 100) -> list[Quarantined]:
        """Dropped and refused records of this dataset."""
        return self._session.quarantine(self._ref.dataset, rule, limit)

    def _fixed(self) -> Ref:
        if self._version is None:
            raise Conflict(
                f"{self._ref.dataset} has no version yet", hint="its first upload is on its way; try again shortly"
            )
        return dataclasses.replace(self._ref, at=str(self._version.version))

    def __repr__(self) -> str:
        at = "no version yet" if self.version is None else f"version {self.version}"
        return f"<Dataset {self.ref}: {at}, {self.rows:,} rows>"

    def _repr_html_(self) -> str:
        fields = {"version": self.version, "rows": self.rows, "fingerprint": self.fingerprint, "tags": self.info.tags}
        top = show.html_fields(self.ref, {**fields, "splits": self._version.splits if self._version else None})
        rows = self.head(5)
        names = list(rows[0]) if rows else []
        return top + (show.html_rows(names, [[row[name] for name in names] for row in rows]) if rows else "")


def _polars() -> Any:
    try:
        import polars  # noqa: PLC0415
    except ImportError:
        raise BadRequest("polars is not installed", hint="pip install polars, or use to_arrow()") from None
    return polars
