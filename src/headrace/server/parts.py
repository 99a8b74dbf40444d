"""What the routes on FastAPI share: answers, bodies, pages, refs and who calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import orjson
from fastapi import Depends, Query, Response
from fastapi import Request as Call
from pydantic import BaseModel, ConfigDict

from headrace import model
from headrace.errors import BadRef, BadRequest
from headrace.model import Principal, Ref

Limit = Annotated[int, Query(ge=1, le=1000)]
Page = Annotated[str | None, Query(max_length=400)]


class Json(Response):
    """Values of the model, or plain JSON types."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The JSON text."""
        return orjson.dumps(model.to_dict(content))


class Body(BaseModel):
    """A JSON body; names that are not its own are refused."""

    model_config = ConfigDict(extra="forbid")


def ref_of(dataset: str, text: str | None) -> Ref:
    """The ref that a path's dataset and a ``ref`` parameter name: '3', 'gold:train', ':train' or a whole ref."""
    if not text:
        return Ref.parse(dataset)
    if "@" not in text:
        return Ref.parse(f"{dataset}{text}" if text.startswith(":") else f"{dataset}@{text}")
    ref = Ref.parse(text)
    if ref.dataset != dataset:
        raise BadRef(f"ref {text[:200]!r} is not of dataset {dataset[:200]!r}", hint="leave the dataset out of ref")
    return ref


def paged(items: Sequence[Any], limit: int, page_token: str | None) -> dict[str, Any]:
    """One page of a list that is held whole; the token is the number of items before the page."""
    start = int(page_token) if page_token and page_token.isascii() and page_token.isdigit() else 0
    if page_token and str(start) != page_token:
        raise BadRequest("the page_token is not one of ours", hint="use next_page_token of the last page")
    more = str(start + limit) if start + limit < len(items) else None
    return {"items": items[start : start + limit], "next_page_token": more}


def listed(text: str | None) -> list[str] | None:
    """The names in a comma-separated parameter, or None."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _principal(call: Call) -> Principal:
    return Principal(**call.scope["headrace.principal"])


Caller = Annotated[Principal, Depends(_principal)]
