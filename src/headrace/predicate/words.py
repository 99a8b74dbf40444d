"""The words of a ``where``: what may stand there at all, decided before anything is parsed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Protocol

import sqlglot
from sqlglot import Token, TokenType
from sqlglot.errors import SqlglotError

from headrace.errors import BadRequest

LENGTH_MAX = 10_000
"""Most characters of an expression."""
TOKENS_MAX = 4_000
"""Most words, literals and operators of an expression, and so most nodes of its tree."""
DEPTH_MAX = 100
"""Deepest nesting of operators; a chain of AND, or of OR, counts once."""
PARENTHESES_MAX = 25
"""Deepest nesting of parentheses: sqlglot's parser recurses some twenty calls for each."""
PREFIXES_MAX = 10
"""Most NOT, + and - in a row."""
FUNCTIONS = ("lower", "upper", "length", "abs", "round", "coalesce", "starts_with")
"""The functions that an expression may call."""

ALLOWED = (
    "allowed are columns, literals, = != <> < <= > >=, AND, OR, NOT, IS [NOT] NULL, [NOT] IN (literals), "
    f"[NOT] BETWEEN, [NOT] LIKE, [NOT] ILIKE, + - * / % and the functions {', '.join(FUNCTIONS)}; no subqueries"
)
_KEYWORDS = {
    "AND": TokenType.AND,
    "OR": TokenType.OR,
    "NOT": TokenType.NOT,
    "IS": TokenType.IS,
    "NULL": TokenType.NULL,
    "IN": TokenType.IN,
    "BETWEEN": TokenType.BETWEEN,
    "LIKE": TokenType.LIKE,
    "ILIKE": TokenType.ILIKE,
    "TRUE": TokenType.TRUE,
    "FALSE": TokenType.FALSE,
}
_SYMBOLS = frozenset(["=", "==", "!=", "<>", "<", "<=", ">", ">=", "+", "-", "*", "/", "%", "(", ")", ","])
_PREFIXES = (TokenType.NOT, TokenType.DASH, TokenType.PLUS)
_PARAMETERS = (TokenType.PLACEHOLDER, TokenType.PARAMETER, TokenType.COLON)
_WORD = re.compile(r"[^\W\d]\w*")


class Columns(Protocol):
    """Gives each column that is named a number."""

    def index(self, parts: tuple[str, ...], start: int, reserved: str) -> int:
        """The number of the column written as ``parts``; ``reserved`` is the SQL word it also is, or empty."""


def refused(what: str, start: int | None = None, hint: str = ALLOWED) -> BadRequest:
    """The error for ``what``, found at character ``start`` counted from 0."""
    if start is None:
        return BadRequest(what, hint=hint)
    return BadRequest(f"{what}, at character {start + 1}", hint=hint, details={"position": start + 1})


def shown(text: str) -> str:
    """``text`` in quotes, cut to a length that fits a message."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of a message that names the one of ``names`` most like ``name``; empty if none is."""
    by_fold = {known.casefold(): known for known in names}
    close = difflib.get_close_matches(name.casefold(), list(by_fold), n=1, cutoff=0.5)
    return f"; the nearest is {by_fold[close[0]]}" if close else ""


def tokenized(text: str) -> list[Token]:
    """The tokens of ``text``, with nothing but white space between them; BadRequest beyond the limits."""
    if len(text) > LENGTH_MAX:
        raise refused(f"where has {len(text):,} characters, the most is {LENGTH_MAX:,}", hint="shorten it")
    try:
        text.encode()
        tokens = sqlglot.tokenize(text)
    except (SqlglotError, UnicodeEncodeError) as error:
        raise refused(f"where cannot be read: {error}", hint="look for a quote that is not closed") from None
    if len(tokens) > TOKENS_MAX:
        raise refused(f"where has {len(tokens):,} words, the most is {TOKENS_MAX:,}", hint="shorten it")
    at = 0
    for token in tokens:
        _only_space(text, at, token.start)
        at = token.end + 1
    _only_space(text, at, len(text))
    if not tokens:
        raise refused("where is empty", hint="such as: amount > 10 AND label IS NOT NULL")
    return tokens


def _only_space(text: str, start: int, stop: int) -> None:
    gap = text[start:stop]
    if gap.strip():
        what = "comments are not allowed" if gap.strip()[:2] in ("--", "/*", "{#") else "this is not allowed"
        raise refused(f"{what} ({shown(gap.strip())})", start + len(gap) - len(gap.lstrip()))


def checked(tokens: Sequence[Token], text: str, columns: Columns) -> Iterator[Token]:
    """The tokens for the parser: each column, however written, becomes its number in ``columns``, as a quoted name."""
    at = depth = prefixes = 0
    while at < len(tokens):
        token, used = _next(tokens, at, text, columns)
        depth += {TokenType.L_PAREN: 1, TokenType.R_PAREN: -1}.get(token.token_type, 0)
        prefixes = prefixes + 1 if token.token_type in _PREFIXES else 0
        if depth > PARENTHESES_MAX or prefixes > PREFIXES_MAX:
            limits = f"at most {PARENTHESES_MAX} parentheses deep, and {PREFIXES_MAX} NOT or signs in a row"
            raise refused("where is nested too deeply", token.start, limits)
        yield token
        at += used


def _next(tokens: Sequence[Token], at: int, text: str, columns: Columns) -> tuple[Token, int]:
    """The next token for the parser, and how many of ``tokens`` it stands for."""
    token, raw = tokens[at], _raw(tokens[at], text)
    after = tokens[at + 1] if at + 1 < len(tokens) else None
    if token.token_type is TokenType.DOT and after and after.start == token.end + 1 and _raw(after, text)[0].isdigit():
        return _made(TokenType.NUMBER, f"0.{after.text}", token, after), 2
    quoted = token.token_type is TokenType.IDENTIFIER
    if not quoted and not _WORD.fullmatch(raw):
        return _listed(token, raw), 1
    called = after is not None and after.token_type is TokenType.L_PAREN
    if not quoted and (called or raw.upper() in _KEYWORDS):
        return _keyword_or_function(token, raw, called), 1
    parts, used = _path(tokens, at, text)
    reserved = "" if quoted or token.token_type is TokenType.VAR else raw.upper()
    number = columns.index(parts, token.start, reserved)
    return _made(TokenType.IDENTIFIER, str(number), token, tokens[at + used - 1]), used


def _raw(token: Token, text: str) -> str:
    return text[token.start : token.end + 1]


def _made(kind: TokenType, text: str, first: Token, last: Token) -> Token:
    return Token(kind, text, first.line, first.col, first.start, last.end)


def _path(tokens: Sequence[Token], at: int, text: str) -> tuple[tuple[str, ...], int]:
    """The parts of the dotted name that begins at ``tokens[at]``, and how many tokens it takes."""
    parts: list[str] = []
    for position in range(at, len(tokens), 2):
        token, raw = tokens[position], _raw(tokens[position], text)
        quoted = token.token_type is TokenType.IDENTIFIER
        if not quoted and not _WORD.fullmatch(raw):
            raise refused(f"{shown(raw)} cannot follow a dot", token.start)
        parts.append(token.text if quoted else raw)
        after = tokens[position + 1] if position + 1 < len(tokens) else None
        if after is None or after.token_type is not TokenType.DOT:
            if after is not None and after.token_type is TokenType.L_PAREN:
                raise refused(f"the function {shown('.'.join(parts))} is not allowed", tokens[at].start)
            return tuple(parts), position + 1 - at
    raise refused("a name must follow the dot", tokens[-1].start)


def _keyword_or_function(token: Token, raw: str, called: bool) -> Token:
    keyword = _KEYWORDS.get(raw.upper())
    if keyword is not None:
        # sqlglot reads LIKE(a, b) as a function with the operands the other way round.
        if keyword in (TokenType.LIKE, TokenType.ILIKE) and called:
            raise refused(f"{raw.upper()} takes a pattern without parentheses", token.start)
        return _made(keyword, raw.upper(), token, token)
    if raw.lower() in FUNCTIONS:
        return _made(TokenType.VAR, raw.upper(), token, token)
    if token.token_type is TokenType.VAR:
        raise refused(f"the function {raw} is not allowed{nearest(raw, FUNCTIONS)}", token.start)
    raise refused(f"{raw.upper()} is not allowed", token.start)


def _listed(token: Token, raw: str) -> Token:
    kind = token.token_type
    if raw in _SYMBOLS or kind is TokenType.NUMBER or (kind is TokenType.STRING and raw.startswith("'")):
        return token
    if kind is TokenType.SEMICOLON:
        raise refused("several statements are not allowed (;)", token.start)
    if kind in _PARAMETERS or raw.startswith("$"):
        raise refused(f"parameters are not allowed ({shown(raw)})", token.start, "write the value itself")
    raise refused(f"{shown(raw)} is not allowed", token.start)
