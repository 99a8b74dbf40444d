"""Where everything of an exchange lies below its root folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Root:
    """The folder of one exchange. Dataset names were checked before they get here, so they make safe folder names."""

    path: Path

    @classmethod
    def at(cls, path: str | Path) -> Root:
        """The root at ``path``, its folders made with access for this user alone; BadRequest if that cannot be."""
        root = cls(Path(path).expanduser().absolute())
        try:
            for folder in (root.path, root.path / "tables", root.path / "quarantine", root.staging, root.keys):
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
