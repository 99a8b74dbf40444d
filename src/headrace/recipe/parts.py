"""What a recipe says, as frozen values, and the steps it may name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from headrace import clean, transform
from headrace.errors import BadRecipe
from headrace.model import Ref, check_name, check_tag
from headrace.recipe.secrets import resolve
from headrace.steps import Step


@dataclass(frozen=True)
class Files:
    """Read the files that a path or glob names. ``source`` names them in ``_source``; default: the path as written."""

    path: str
    format: Literal["auto", "json", "ndjson", "csv", "parquet", "arrow", "text"] = "auto"
    source: str | None = None


@dataclass(frozen=True)
class Collect:
    """Where records come from: ``files`` (path, format, source) or a ``dataset`` (ref). Secrets stay references."""

    kind: Literal["files", "dataset"]
    path: str = ""
    format: str = "auto"
    source: str | None = None
    ref: Ref | None = None
    base: str = ""

    @property
    def location(self) -> str:
        """The path or glob with its secrets filled in, counted from the recipe's folder; URLs as they are."""
        path = os.path.expanduser(resolve(self.path, Path(self.base)))
        return path if "://" in path else os.path.join(self.base, path)


@dataclass(frozen=True)
class Expect:
    """What the result must hold, or nothing is published; ``max_dropped`` is a fraction of the rows read."""

    min_rows: int | None = None
    max_rows: int | None = None
    max_dropped: float | None = None

    def __post_init__(self) -> None:
        if any(number is not None and number < 0 for number in (self.min_rows, self.max_rows, self.max_dropped)):
            raise BadRecipe("expectations cannot be negative", hint="give a number of rows, or a fraction")
        if self.max_dropped is not None and not self.max_dropped <= 1:
            raise BadRecipe(f"max_dropped {self.max_dropped} is not a fraction", hint="0.6 allows 60% to be dropped")


@dataclass(frozen=True)
class Publish:
    """How the result becomes a version: an optional tag, named splits with their fractions, expectations."""

    tag: str | None = None
    split: Mapping[str, float] = field(default_factory=dict)
    expect: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PublishOptions:
    """How the result becomes a version."""

    tag: str | None = None
    split: Mapping[str, float] | None = None
    expect: Expect | None = None

    def __post_init__(self) -> None:
        if self.tag is not None:
            check_tag(self.tag)
        if self.split is not None:
            for name, fraction in self.split.items():
                check_name(name, "split")
                if not 0 < fraction <= 1:
                    raise BadRecipe(f"split {name!r}: {fraction} is not within 0 and 1", hint="fractions sum to 1")
            if abs(sum(self.split.values()) - 1) > 1e-9:
                raise BadRecipe(
                    f"the split sums to {sum(self.split.values()):.10g}, not 1", hint="{train: 0.9, val: 0.1}"
                )


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. ``clean`` and ``transform`` are the steps that run, expanded; ``fingerprint`` is a hex sha256.

    The fingerprint covers the meaning with all defaults, not spelling, comments or the folder the recipe lies in.
    """

    dataset: str
    collect: tuple[Collect, ...]
    clean: tuple[Step, ...]
    transform: tuple[Step, ...]
    publish: Publish
    schedule: str | None
    text: str
    fingerprint: str


SECTIONS: Mapping[str, Mapping[str, type[Step]]] = {"clean": clean.STEPS, "transform": transform.STEPS}
"""The steps each section of a recipe may list, by name."""
