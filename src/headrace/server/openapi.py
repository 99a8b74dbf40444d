"""The OpenAPI description of the routes that stand before FastAPI."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from headrace.collect.formats import CONTENT_TYPES
from headrace.server.render import PARQUET, STREAMS

_ERROR = {
    "description": "An error",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_OBJECT = {"schema": {"type": "object"}}


def _parameter(name: str, where: str, kind: str, text: str) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": {"type": kind}, "description": text}


def _route(tag: str, summary: str, answer: dict[str, Any], *parameters: dict[str, Any], **other: Any) -> dict[str, Any]:
    answers = {"200": {"description": "Done", "content": answer}, "default": _ERROR}
    return {"tags": [tag], "summary": summary, "parameters": list(parameters), "responses": answers, **other}


_DATASET = _parameter("dataset", "path", "string", "The dataset's name")
_IDEMPOTENCY = _parameter("Idempotency-Key", "header", "string", "The same key and body is stored once")
_JSON = {"application/json": _OBJECT}

_HOT: dict[str, Any] = {
    "/upload": {
        "post": _route(
            "uploads",
            "Store one JSON record, or an array of them, in 'default'; answered once durable",
            _JSON,
            _IDEMPOTENCY,
            requestBody={"required": True, "content": _JSON},
        )
    },
    "/get_data": {
        "get": _route(
            "uploads",
            "The records of 'default' as uploaded, in order of arrival",
            {"application/json": {"schema": {"type": "array", "items": {"type": "object"}}}},
            _parameter("limit", "query", "integer", "Most records"),
            _parameter("offset", "query", "integer", "Records to leave out at the start"),
        )
    },
    "/v1/datasets/{dataset}/records": {
        "post": _route(
            "uploads",
            "Store records; answered once durable",
            _JSON,
            _DATASET,
            _IDEMPOTENCY,
            _parameter("key", "query", "string", "The column that names each record"),
            requestBody={"required": True, "content": dict.fromkeys(CONTENT_TYPES, _BINARY)},
        ),
        "get": _route(
            "datasets",
            "Read records, in the form that Accept asks for",
            dict.fromkeys([*STREAMS, PARQUET], _BINARY),
            _DATASET,
            _parameter("ref", "query", "string", "A version, tag or 'latest', with ':split' if any"),
            _parameter("columns", "query", "string", "Names, comma-separated"),
            _parameter("where", "query", "string", "A SQL condition over columns"),
            _parameter("limit", "query", "integer", "Most records"),
        ),
    },
    "/v1/files/{id}": {
        "get": _route(
            "feed",
            "A data file, by signed URL; Range is honoured",
            {PARQUET: _BINARY},
            _parameter("id", "path", "string", "A file id of a manifest"),
            _parameter("exp", "query", "integer", "When the URL ends, in seconds since 1970"),
            _parameter("by", "query", "string", "Whom it was signed for"),
            _parameter("sig", "query", "string", "The signature"),
        )
    },
}

_ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "hint", "request_id"],
            "properties": {name: {"type": "string"} for name in ("code", "message", "hint", "request_id")},
        }
    },
}


def describe_hot_routes(api: FastAPI) -> None:
    """Add the routes that FastAPI does not serve to its OpenAPI document."""
    plain = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            document = plain()
            document["paths"] = {**document.get("paths", {}), **_HOT}
            parts = document.setdefault("components", {})
            parts.setdefault("schemas", {})["Error"] = _ERROR_SCHEMA
            parts["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"bearer": []}]
        return api.openapi_schema or {}

    api.openapi = openapi  # type: ignore[method-assign]
