"""The routes that are not hot, on FastAPI: thin skins on the exchange, each one call and one answer."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

from fastapi import FastAPI, Query, Response
from fastapi import Request as Call
from pydantic import Field

from headrace import __version__, model
from headrace.server.metrics import Metrics
from headrace.server.openapi import describe_hot_routes
from headrace.server.pages import add_pages
from headrace.server.parts import Body, Caller, Json, Limit, Page, listed, paged, ref_of
from headrace.server.policies import add_policies
from headrace.server.wire import Workers

if TYPE_CHECKING:
    from headrace.exchange import Exchange


class TagBody(Body):
    """A tag for the version behind ``ref``."""

    name: str
    ref: str = "latest"


class SignBody(Body):
    """File ids of a manifest."""

    ids: list[str]


class RecipeBody(Body):
    """A recipe's YAML text; ``base`` is the folder, on the exchange, that its relative paths start from."""

    recipe: str
    base: str = "."


class PreviewBody(RecipeBody):
    """A recipe, and the number of rows to try it on."""

    rows: int = 1000


class TokenBody(Body):
    """A new token; without ``days`` it does not expire."""

    name: str
    role: str = "producer"
    datasets: list[str] = Field(default=["*"])
    days: int | None = None


def create_api(exchange: Exchange, workers: Workers, metrics: Metrics, on_revoke: Callable[[], None]) -> FastAPI:
    """The FastAPI application."""
    api = FastAPI(
        title="Headrace",
        version=__version__,
        description="A data exchange for model training.",
        default_response_class=Json,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_datasets(api, exchange, workers)
    _add_feed(api, exchange, workers)
    _add_runs(api, exchange, workers)
    _add_tokens(api, exchange, workers, on_revoke)
    add_policies(api, exchange, workers)
    _add_status(api, exchange, workers, metrics)
    describe_hot_routes(api)
    return api


def _add_datasets(api: FastAPI, exchange: Exchange, workers: Workers) -> None:
    @api.get("/v1/datasets", tags=["datasets"])
    async def datasets(p: Caller, limit: Limit = 1000, page_token: Page = None) -> Response:
        """Datasets that the caller may see."""
        return Json(paged(await workers.run(exchange.datasets, p), limit, page_token))

    @api.get("/v1/datasets/{name}", tags=["datasets"])
    async def dataset(p: Caller, name: str) -> Response:
        """One dataset."""
        return Json(await workers.run(exchange.dataset, p, model.check_name(name)))

    @api.get("/v1/datasets/{name}/versions", tags=["datasets"])
    async def versions(p: Caller, name: str, limit: Limit = 100, page_token: Page = None) -> Response:
        """Versions, newest first."""
        items, more = await workers.run(exchange.versions, p, model.check_name(name), limit, page_token)
        return Json({"items": items, "next_page_token": more})

    @api.get("/v1/datasets/{name}/versions/{at}", tags=["datasets"])
    async def version(p: Caller, name: str, at: str) -> Response:
        """One version by number, tag or 'latest'."""
        return Json(await workers.run(exchange.version, p, ref_of(name, at)))

    @api.post("/v1/datasets/{name}/tags", tags=["datasets"])
    async def tag(p: Caller, name: str, body: TagBody) -> Response:
        """Name a version."""
        return Json(await workers.run(exchange.tag, p, ref_of(name, body.ref), model.check_tag(body.name)))

    @api.get("/v1/datasets/{name}/diff", tags=["datasets"])
    async def diff(p: Caller, name: str, base: str, other: str = "latest") -> Response:
        """What changed between two versions, by ``_id``."""
        return Json(await workers.run(exchange.diff, p, ref_of(name, base), ref_of(name, other)))

    @api.get("/v1/datasets/{name}/quarantine", tags=["datasets"])
    async def quarantine(
        p: Caller, name: str, rule: str | None = None, limit: Limit = 100, page_token: Page = None
    ) -> Response:
        """Records that were dropped or refused, with rule and reason."""
        items, more = await workers.run(exchange.quarantine, p, model.check_name(name), rule, limit, page_token)
        return Json({"items": items, "next_page_token": more})


def _add_feed(api: FastAPI, exchange: Exchange, workers: Workers) -> None:
    @api.get("/v1/datasets/{name}/manifest", tags=["feed"])
    async def manifest(
        p: Caller, call: Call, name: str, ref: str | None = None, columns: str | None = None, page_token: Page = None
    ) -> Response:
        """The exact files behind a ref."""
        found = await workers.run(exchange.manifest, p, ref_of(name, ref), listed(columns), page_token)
        etag = f'W/"{found.fingerprint}-{found.version}-{page_token or 0}-{quote(columns or "")}"'
        if call.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers={"etag": etag})
        return Json(found, headers={"etag": etag})

    @api.get("/v1/datasets/{name}/tokenizer", tags=["feed"])
    async def tokenizer(p: Caller, name: str, ref: str | None = None) -> Response:
        """The tokenizer.json that made a version's tokens."""
        found = await workers.run(exchange.tokenizer, p, ref_of(name, ref))
        return Response(found, media_type="application/json")

    @api.post("/v1/files:sign", tags=["feed"])
    async def sign(p: Caller, call: Call, body: SignBody) -> Response:
        """Short-lived URLs for files of a manifest."""
        signed = await workers.run(exchange.sign, p, body.ids)
        base, by = str(call.base_url).rstrip("/"), quote(p.name, safe="")
        urls = {
            id: f"{base}/v1/files/{quote(id, safe='')}?exp={exp}&by={by}&sig={quote(sig, safe='')}&sp=r"
            for id, (exp, sig) in signed.items()
        }
        ends = min((exp for exp, _ in signed.values()), default=0)
        when = datetime.datetime.fromtimestamp(ends, datetime.UTC).isoformat().replace("+00:00", "Z")
        return Json({"urls": urls, "expires_at": when})

    @api.get("/v1/datasets/{name}/trace", tags=["feed"])
    async def trace(
        p: Caller,
        name: str,
        ref: str | None = None,
        step: Annotated[int | None, Query(ge=0)] = None,
        seed: int = 0,
        epoch: Annotated[int, Query(ge=0)] = 0,
        batch_size: Annotated[int, Query(ge=1)] = 32,
        world_size: Annotated[int, Query(ge=1)] = 1,
        shuffle: str = "window",
        row: str | None = None,
        source: str | None = None,
    ) -> Response:
        """From a training step, a row or a source locator to rows and their source records."""
        args = (step, seed, epoch, batch_size, world_size, shuffle, row, source)
        return Json({"items": await workers.run(exchange.trace, p, ref_of(name, ref), *args), "next_page_token": None})


def _add_runs(api: FastAPI, exchange: Exchange, workers: Workers) -> None:
    @api.post("/v1/recipes:check", tags=["runs"])
    async def check(p: Caller, body: RecipeBody) -> Response:
        """Problems of a recipe; an empty list means that it can run."""
        return Json({"problems": await workers.run(exchange.check_recipe, p, body.recipe, body.base)})

    @api.post("/v1/runs", tags=["runs"])
    async def run(p: Caller, body: RecipeBody) -> Response:
        """Queue a run of a recipe."""
        return Json(await workers.run(exchange.run, p, body.recipe, body.base), status_code=202)

    @api.post("/v1/runs:preview", tags=["runs"])
    async def preview(p: Caller, body: PreviewBody) -> Response:
        """The effect of a recipe on a sample; commits nothing."""
        return Json(await workers.run(exchange.preview, p, body.recipe, body.base, body.rows))

    @api.get("/v1/runs", tags=["runs"])
    async def runs(p: Caller, limit: Limit = 1000, page_token: Page = None) -> Response:
        """Runs, newest first."""
        return Json(paged(await workers.run(exchange.runs, p), limit, page_token))

    @api.get("/v1/runs/{run_id}", tags=["runs"])
    async def run_status(p: Caller, run_id: str) -> Response:
        """One run with its steps and counts."""
        return Json(await workers.run(exchange.run_status, p, run_id))


def _add_tokens(api: FastAPI, exchange: Exchange, workers: Workers, on_revoke: Callable[[], None]) -> None:
    @api.get("/v1/receipts/{receipt_id}", tags=["uploads"])
    async def receipt(p: Caller, receipt_id: str) -> Response:
        """What became of an upload."""
        return Json(await workers.run(exchange.receipt, p, receipt_id))

    @api.post("/v1/tokens", tags=["tokens"])
    async def create_token(p: Caller, body: TokenBody) -> Response:
        """Create a token; its secret is in this answer only."""
        args = (body.name, body.role, tuple(body.datasets), body.days)
        return Json(await workers.run(exchange.create_token, p, *args), status_code=201)

    @api.get("/v1/tokens", tags=["tokens"])
    async def tokens(p: Caller, limit: Limit = 1000, page_token: Page = None) -> Response:
        """Tokens without their secrets."""
        return Json(paged(await workers.run(exchange.tokens, p), limit, page_token))

    @api.delete("/v1/tokens/{token_id}", tags=["tokens"])
    async def revoke(p: Caller, token_id: str) -> Response:
        """Revoke a token, at once."""
        revoked = await workers.run(exchange.revoke_token, p, token_id)
        on_revoke()
        return Json(revoked)


def _add_status(api: FastAPI, exchange: Exchange, workers: Workers, metrics: Metrics) -> None:
    @api.get("/healthz", tags=["status"])
    async def healthz() -> Response:
        """The process answers."""
        return Json({"status": "ok", "version": __version__})

    @api.get("/readyz", tags=["status"])
    async def readyz() -> Response:
        """The exchange can take and give data."""
        return Json({"status": "ready", **await workers.run(exchange.health)})

    @api.get("/metrics", tags=["status"])
    async def prometheus() -> Response:
        """Counters in the Prometheus text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    add_pages(api)
