"""Where everything of an exchange lies below its root folder."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import BadRequest, Damaged

_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Root:
    """The folder of one exchange. Dataset names were checked before they get here, so they make safe folder names."""

    path: Path

    @classmethod
    def at(cls, path: str | Path) -> Root:
        """The root at ``path``, its folders made with access for this user alone; BadRequest if that cannot be."""
        root = cls(Path(path).expanduser().absolute())
        try:
            for folder in (
                root.path,
                root.path / "tables",
                root.path / "quarantine",
                root.staging,
                root.keys,
                root.views,
            ):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for file in (root.catalog, root.runs):
                # The root may be a folder that others can look into: what SQLite makes itself, anyone might read.
                os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise BadRequest(
                f"the root {root.path} cannot be used: {error.strerror}", hint="give a folder that you may write to"
            ) from None
        return root

    @property
    def catalog(self) -> Path:
        """The catalog's SQLite file."""
        return self.path / "catalog.db"

    @property
    def runs(self) -> Path:
        """The durable run log (dbos)."""
        return self.path / "runs.db"

    @property
    def staging(self) -> Path:
        """Unpublished work, a folder per run."""
        return self.path / "staging"

    @property
    def keys(self) -> Path:
        """Secrets of this exchange: the URL signing key, the owner's token."""
        return self.path / "keys"

    @property
    def lock(self) -> Path:
        """Locked by the process that owns the root; its text names that process and, if it serves, its URL."""
        return self.path / "lock"

    @property
    def tokenizers(self) -> Path:
        """Folder of the tokenizer.json files that recipes may name."""
        return self.path / "tokenizers"

    @property
    def views(self) -> Path:
        """Policy views: data files as policies show them."""
        return self.path / "views"

    def secret(self, name: str) -> bytes:
        """The key ``name`` of this exchange, made on first use, whole or not at all. Raises Damaged."""
        path = self.keys / name
        if not path.exists():
            fresh = path.with_name(f"{name}.{secrets.token_hex(8)}")
            with os.fdopen(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            # A link, unlike a rename, leaves the key of a process that was faster.
            with suppress(FileExistsError):
                os.link(fresh, path)
            fresh.unlink()
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise Damaged(f"{path} is not a key", hint="restore it, or remove it: the next start makes a new one")
        return key

    def table(self, dataset: str) -> Path:
        """The Delta table of a dataset."""
        return self.path / "tables" / dataset

    def quarantine(self, dataset: str) -> Path:
        """The Delta table of a dataset's dropped and refused records."""
        return self.path / "quarantine" / dataset

    def run(self, run_id: str) -> Path:
        """The staging folder of a run."""
        return self.staging / run_id

    def preview(self, run_id: str) -> Path:
        """Where a worker leaves the answer of a preview for the process that asked."""
        return self.staging / f"preview-{run_id}.json"
