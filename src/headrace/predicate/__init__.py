"""``where``: a SQL boolean expression over the columns of a dataset, parsed by sqlglot and evaluated on Arrow arrays.

What is allowed is listed, everything else is refused by name. First word by word (``words``), so that sqlglot's parser
only ever sees columns, literals, listed functions and operators; then node by node (``compiler``), so that nothing its
grammar adds can change a meaning unseen.

Semantics are SQL's, with three-valued logic: a row is kept where the expression is true, not where it is false or null.

- Division of whole numbers truncates; division by zero is null (both as in SQLite).
- Whole numbers have 64 bits, and an overflow is an error. Decimals are compared exactly but computed as float64.
- Beside fractions whole numbers beyond 2**53 round. NaN equals nothing, itself included.
- LIKE is case-sensitive, ILIKE is not; a backslash escapes ``%`` and ``_``. Text compares by code point.
- Dates and timestamps compare with ISO 8601 text, read as UTC where the column has a time zone and the text none.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
from sqlglot import Token, exp
from sqlglot.errors import ParseError
from sqlglot.parser import Parser

from headrace.errors import BadRequest
from headrace.predicate.columns import Reference, References
from headrace.predicate.compiler import Compiler
from headrace.predicate.nodes import Node
from headrace.predicate.words import DEPTH_MAX, FUNCTIONS, LENGTH_MAX, TOKENS_MAX, checked, refused, shown, tokenized

__all__ = ["DEPTH_MAX", "FUNCTIONS", "LENGTH_MAX", "TOKENS_MAX", "Predicate", "compile_where"]


@dataclass(frozen=True)
class Predicate:
    """A compiled ``where``. ``columns`` are the top-level columns that it reads and a batch must have."""

    columns: frozenset[str]
    _references: tuple[Reference, ...]
    _root: Node

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The rows of ``batch`` for which the expression is true, in their order, with all columns of ``batch``.

        Raises BadRequest if a column is missing or of another type than at compile time, or if arithmetic overflows.
        """
        try:
            mask = self._root.run([reference.load(batch) for reference in self._references])
            if isinstance(mask, pa.Scalar):
                return batch if mask.as_py() else batch.slice(0, 0)
            return _filtered(batch, mask)
        except pa.ArrowException as error:
            message = f"where cannot be computed on these rows: {error}"
            raise BadRequest(message, hint="leave out the rows or the arithmetic that overflow") from None


def _filtered(batch: pa.RecordBatch, mask: pa.BooleanArray) -> pa.RecordBatch:
    kinds = [field.type for field in batch.schema]
    if not any(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind) for kind in kinds):
        return batch.filter(mask)
    # Arrow cannot filter views: those columns take the way over their plain type.
    plain = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    fields = [field.with_type(plain.get(field.type, field.type)) for field in batch.schema]
    return batch.cast(pa.schema(fields, batch.schema.metadata)).filter(mask).cast(batch.schema)


def compile_where(text: str, schema: pa.Schema) -> Predicate:
    """Check ``text`` against ``schema`` and compile it.

    All that is not listed, unknown columns and clashes of types raise BadRequest; its ``details["position"]`` is the
    offending character, counted from 1, where known.
    """
    references = References(schema)
    tokens = list(checked(tokenized(text), text, references))
    try:
        tree = _parsed(tokens, text)
        _limit_depth(tree)
        root = Compiler(references.found).predicate(tree)
    except RecursionError:
        raise refused("where is nested too deeply", hint="simplify it") from None
    return Predicate(frozenset(reference.path[0] for reference in references.found), tuple(references.found), root)


def _parsed(tokens: list[Token], text: str) -> exp.Expression:
    try:
        found = Parser().parse_into(exp.Condition, tokens, text)
    except ParseError as error:
        known = error.errors[0] if error.errors else {}
        near = str(known.get("start_context") or "")[-20:] + str(known.get("highlight") or "")
        message = f"where cannot be parsed near {shown(near)}" if near else "where cannot be parsed"
        raise refused(message, hint="look for a missing operand, operator or parenthesis") from None
    if len(found) != 1 or not isinstance(found[0], exp.Expression):
        raise refused("where must be one expression")
    return found[0]


def _limit_depth(tree: exp.Expression) -> None:
    stack = [(tree, 1)]
    while stack:
        node, depth = stack.pop()
        if depth > DEPTH_MAX:
            raise refused(f"where is nested more than {DEPTH_MAX} deep", hint="simplify it")
        for child in node.iter_expressions():
            chained = isinstance(node, exp.And | exp.Or) and type(child) is type(node)
            stack.append((child, depth if chained else depth + 1))
