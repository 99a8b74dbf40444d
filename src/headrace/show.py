"""How values look to a person: one line of text in a shell, a table in a notebook. Knows no value by name."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping
from typing import Any

CELL_CHARS = 200


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = "" if value is None else str(value)
    return text if len(text) <= CELL_CHARS else text[: CELL_CHARS - 1] + "…"


def _is_values(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and dataclasses.is_dataclass(value[0])


def _cell(value: Any) -> str:
    if _is_values(value):
        names = [f.name for f in dataclasses.fields(value[0])]
        return html_rows(names, [[getattr(item, name) for name in names] for item in value])
    return html.escape(_text(value))


def html_rows(names: list[str], rows: list[list[Any]]) -> str:
    """An HTML table with a head; every name and cell is escaped, long texts are cut."""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def html_fields(title: str, fields: Mapping[str, Any]) -> str:
    """An HTML table of names and values under a title; empty values are left out."""
    shown = {name: value for name, value in fields.items() if value not in (None, "", (), [], {})}
    body = "".join(f"<tr><th>{html.escape(name)}</th><td>{_cell(value)}</td></tr>" for name, value in shown.items())
    return f"<table><caption>{html.escape(title)}</caption><tbody>{body}</tbody></table>"


class Shown:
    """Gives a frozen value its table in notebooks."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return html_fields(type(self).__name__, fields)
