"""Rules on single texts: one Unicode form, repaired mojibake, no control characters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from unicodedata import normalize

import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import BadRecipe
from headrace.steps import Outcome, Position, Step, column, replaced, user_columns

CONTROLS = r"[\x00-\x08\x0b-\x1f\x{7f}-\x{9f}]"


def _ftfy() -> Any:
    import ftfy  # noqa: PLC0415

    return ftfy


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


@dataclass(frozen=True)
class Unicode(Step):
    """Rewrite texts into one Unicode form; drops nothing, nulls stay null.

    ``fix_mojibake`` undoes UTF-8 that was decoded as another encoding; ``control`` removes control characters but
    newline and tab. ``columns`` defaults to all text columns.
    """

    name: ClassVar[str] = "unicode"

    columns: tuple[str, ...] = ()
    form: Literal["NFC", "NFD", "NFKC", "NFKD"] = "NFC"
    fix_mojibake: bool = True
    control: bool = True

    def apply(self, batch: pa.RecordBatch, state: Mapping[str, Any], at: Position) -> Outcome:  # noqa: ARG002
        """``batch`` with its texts rewritten, every row kept."""
        names = self.columns or [n for n in user_columns(batch.schema) if _is_text(batch.schema.field(n).type)]
        for name in names:
            texts = column(batch, name, self.name)
            if not _is_text(texts.type):
                raise BadRecipe(
                    f"step 'unicode': column {name!r} is {texts.type}, not text", hint="name text columns only"
                )
            clean = self._clean(texts)
            if clean is not texts:
                batch = replaced(batch, name, clean)
        return Outcome(batch)

    def _clean(self, texts: pa.Array) -> pa.Array:
        wide = pc.invert(pc.string_is_ascii(texts)).fill_null(False)
        if wide.true_count:
            some = texts.filter(wide)
            if self.fix_mojibake:
                fix = _ftfy().fix_encoding
                some = pa.array([fix(text) for text in some.to_pylist()], texts.type)
            # pyarrow 23 leaves NFC decomposed, so the standard library does it.
            some = pa.array([normalize(self.form, text) for text in some.to_pylist()], texts.type)
            texts = pc.replace_with_mask(texts, wide, some)
        if self.control:
            dirty = pc.match_substring_regex(texts, CONTROLS).fill_null(False)
            if dirty.true_count:
                some = pc.replace_substring_regex(texts.filter(dirty), CONTROLS, "")
                texts = pc.replace_with_mask(texts, dirty, some)
        return texts
