"""The pages of the server and what they are made of: files of this package alone, never of another host."""

from __future__ import annotations

import mimetypes
from pathlib import Path

from fastapi import FastAPI, Response

from headrace.errors import NotFound

FOLDER = Path(__file__).parent / "static"
PREFIX = "/static/"
_PAGES = {"/": "home.html", "/docs": "docs.html"}
_POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none'"
)


def add_pages(api: FastAPI) -> None:
    """Serve the pages and the files they ask for."""
    files = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*") if path.is_file()}

    def page(name: str) -> Response:
        headers = {
            "content-security-policy": _POLICY,
            "referrer-policy": "no-referrer",
        }
        return Response(files[name].read_bytes(), media_type="text/html; charset=utf-8", headers=headers)

    for route, name in _PAGES.items():
        api.add_api_route(route, lambda name=name: page(name), include_in_schema=False)

    @api.get(PREFIX + "{name:path}", include_in_schema=False)
    def static(name: str) -> Response:
        # Looked up by name among the files known at the start, so that no path leads elsewhere.
        if name not in files or name.endswith(".html"):
            raise NotFound(f"there is no file {name[:80]!r}", hint="GET / is the first page")
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        headers = {"cache-control": "public, max-age=3600"}
        return Response(files[name].read_bytes(), media_type=kind, headers=headers)
